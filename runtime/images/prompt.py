"""Prompts with images: placeholders among the ids, and the rows that replace them.

In a prompt's text an image is a placeholder string; among its ids it is `IMAGE`, which is no token. In the ids of a
merged prompt, each row of an image has an id of its own above the vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.errors import PromptError
from engines.vision import Vision
from runtime.images.decode import Picture
from runtime.images.tiling import Rows, arrange

IMAGE = -200  # an image among ids, as in the LLaVA family
Ids = NDArray[np.int64]


def encode_image(runner: Vision, picture: Picture) -> Rows:
    """Run an image's tiles through tower and projector; returns its rows [tokens, d] in the order of its layout."""
    return arrange(picture.layout, runner.project(picture.pixels), runner.newline)


def mention(text: str, placeholder: str, images: int) -> str:
    """Return a text with one placeholder per image; if it has none, they are put in lines before it.

    Raises PromptError if the text has placeholders, but not as many as there are images.
    """
    count = text.count(placeholder)
    if count not in (0, images):
        raise PromptError(
            f"the prompt has {placeholder} {count} times, but there are {images} images; write it once per image, or "
            "leave it out of the text"
        )
    return text if count else f"{placeholder}\n" * images + text


def mentioned(messages: str | list[dict[str, str]], placeholder: str, images: int) -> str | list[dict[str, str]]:
    """Return messages, or a user's text, with one placeholder per image.

    Images without a placeholder in an earlier message belong to the last one; see `mention`.
    """
    if isinstance(messages, str):
        return mention(messages, placeholder, images)
    *earlier, last = messages
    before = sum(turn["content"].count(placeholder) for turn in earlier)
    return [*earlier, last | {"content": mention(last["content"], placeholder, images - before)}]


def encode(text: str, placeholder: str, encoder: Callable[[str], Ids], drop: bool = False) -> Ids:
    """Encode a prompt to ids [P], with `IMAGE` for each placeholder; the text between them is encoded piece by piece.

    `drop` removes the first token after each image: the published code of the LLaVA family does so with tokenizers
    that add no first token.
    """
    first, *others = (encoder(piece) if piece else np.zeros(0, np.int64) for piece in text.split(placeholder))
    ids = [first]
    for piece in others:
        ids += [np.array([IMAGE]), piece[int(drop) :]]
    return np.concatenate(ids).astype(np.int64)


def merge(ids: Ids, images: Sequence[Rows], embed: Callable[[Ids], Rows]) -> Rows:
    """Merge a prompt's ids, with `IMAGE` for each image, and the images' rows [tokens, d] into float32 rows [P, d].

    `embed` maps ids [A] to rows [A, d]. Raises PromptError unless `ids` has as many placeholders as there are images.
    """
    text = ids != IMAGE
    if (count := int(len(ids) - text.sum())) != len(images):
        raise PromptError(f"the prompt has {count} placeholders for {len(images)} images; write one for each image")
    if not images:
        return embed(ids)
    rows = embed(ids[text]) if text.any() else np.zeros((0, images[0].shape[1]), np.float32)
    pieces = np.split(rows, np.cumsum(text)[~text])
    merged = [pieces[0]]
    for image, piece in zip(images, pieces[1:], strict=True):
        merged += [image, piece]
    return np.concatenate(merged).astype(np.float32)


def placeholder_ids(ids: Ids, images: Sequence[Rows], vocab: int) -> Ids:
    """The int64 ids [P] of a merged prompt: `vocab`, `vocab` + 1, … stand for the rows of all images in order.

    Raises PromptError unless `ids` has as many placeholders as there are images.
    """
    counts = [len(image) for image in images]
    starts = vocab + np.cumsum([0, *counts[:-1]])
    runs = [np.arange(start, start + count)[:, None] for start, count in zip(starts, counts, strict=False)]
    merged = merge(ids, [run.astype(np.float32) for run in runs], lambda text: text[:, None].astype(np.float32))
    return merged[:, 0].astype(np.int64)
