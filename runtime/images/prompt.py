"""Prompts with images: placeholders among the ids, and the rows that take their place.

An image stands in a prompt as text that no token is made of; among ids it is
`IMAGE`, which is no token either. Embeddings of text come from whoever holds the
table. Nothing here knows files, a tokenizer or how a back end runs.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.errors import PromptError
from engines.vision import Vision
from runtime.images.decode import Picture
from runtime.images.tiling import Rows, arrange

IMAGE = -200  # an image among ids
Ids = NDArray[np.int64]


def encode_image(runner: Vision, picture: Picture) -> Rows:
    """The tokens [n, d] of an image: its tiles through the tower and the projector, in their layout."""
    return arrange(picture.layout, runner.project(picture.pixels), runner.newline)


def mention(text: str, placeholder: str, images: int) -> str:
    """A question with a placeholder for each image: those it has, or as many lines before it.

    Raises PromptError if it has some, but not as many as there are images.
    """
    count = text.count(placeholder)
    if count not in (0, images):
        raise PromptError(
            f"the prompt mentions {placeholder} {count} times and {images} images are given; make it as many, or "
            "leave it out of the text"
        )
    return text if count else f"{placeholder}\n" * images + text


def mentioned(messages: str | list[dict[str, str]], placeholder: str, images: int) -> str | list[dict[str, str]]:
    """Messages, or a user's text, with a placeholder for each image: as `mention` has it, in the last message unless
    earlier ones have some."""
    if isinstance(messages, str):
        return mention(messages, placeholder, images)
    *earlier, last = messages
    before = sum(turn["content"].count(placeholder) for turn in earlier)
    return [*earlier, last | {"content": mention(last["content"], placeholder, images - before)}]


def encode(text: str, placeholder: str, encoder: Callable[[str], Ids], drop: bool = False) -> Ids:
    """Ids [P] of a prompt, `IMAGE` for each placeholder; the text between is encoded piece by piece.

    `drop` leaves out the first token after each image, as the published code of
    this kind of model does where its tokenizer adds no token of its own.
    """
    first, *others = (encoder(piece) if piece else np.zeros(0, np.int64) for piece in text.split(placeholder))
    ids = [first]
    for piece in others:
        ids += [np.array([IMAGE]), piece[int(drop) :]]
    return np.concatenate(ids).astype(np.int64)


def merge(ids: Ids, images: Sequence[Rows], embed: Callable[[Ids], Rows]) -> Rows:
    """The rows [L, d] of a prompt: `embed` (ids [A] -> [A, d]) of its text, tokens [n, d] for each image in its order.

    Raises PromptError unless `ids` has as many placeholders as there are images.
    """
    text = ids != IMAGE
    if (count := int(len(ids) - text.sum())) != len(images):
        raise PromptError(
            f"the prompt has {count} placeholders for {len(images)} images; it takes one for each, in their order"
        )
    if not images:
        return embed(ids)
    rows = embed(ids[text]) if text.any() else np.zeros((0, images[0].shape[1]), np.float32)
    pieces = np.split(rows, np.cumsum(text)[~text])
    merged = [pieces[0]]
    for image, piece in zip(images, pieces[1:], strict=True):
        merged += [image, piece]
    return np.concatenate(merged).astype(np.float32)


def placeholder_ids(ids: Ids, images: Sequence[Rows], vocab: int) -> Ids:
    """The ids [L] of a merged prompt: those from `vocab` on stand for the rows of all images, one after the other.

    Raises PromptError unless `ids` has as many placeholders as there are images.
    """
    counts = [len(image) for image in images]
    starts = vocab + np.cumsum([0, *counts[:-1]])
    runs = [np.arange(start, start + count)[:, None] for start, count in zip(starts, counts, strict=False)]
    merged = merge(ids, [run.astype(np.float32) for run in runs], lambda text: text[:, None].astype(np.float32))
    return merged[:, 0].astype(np.int64)
