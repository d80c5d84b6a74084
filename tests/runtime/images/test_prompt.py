"""Prompts with images: placeholders in text and ids, and merged rows."""

import numpy as np
from numpy.typing import NDArray

from engines.errors import PromptError
from runtime.images.prompt import IMAGE, encode, mention, merge
from tests.support.cases import refused


def test_merged_rows() -> None:
    table = np.arange(20, dtype=np.float32).reshape(10, 2)
    a, b = np.full((3, 2), -1, np.float32), np.full((1, 2), -2, np.float32)
    ids = np.array([IMAGE, 4, 5, IMAGE, 6])
    merged = merge(ids, [a, b], lambda text: table[text])
    assert merged.tolist() == [*a.tolist(), *table[4:6].tolist(), *b.tolist(), *table[6:7].tolist()]
    assert len(merged) == int((ids != IMAGE).sum()) + 3 + 1
    assert merge(np.array([IMAGE]), [a], lambda text: table[text]).tolist() == a.tolist()
    assert merge(np.array([1, 2]), [], lambda text: table[text]).tolist() == table[1:3].tolist()
    for count in (0, 1, 3):
        with refused(PromptError, "2 placeholders", f"{count} images", "one for each"):
            merge(ids, [a] * count, lambda text: table[text])


def test_prompts_that_mention_images() -> None:
    assert mention("What?", "<image>", 2) == "<image>\n<image>\nWhat?" and mention("What?", "<image>", 0) == "What?"
    assert mention("In <image> what?", "<image>", 1) == "In <image> what?"
    with refused(PromptError, "<image> 1 times", "2 images", "leave it out"):
        mention("In <image> what?", "<image>", 2)

    def letters(text: str) -> NDArray[np.int64]:
        return np.array([ord(letter) for letter in text])

    assert encode("a<image>bc<image>", "<image>", letters).tolist() == [97, IMAGE, 98, 99, IMAGE]
    assert encode("a<image>bc<image>", "<image>", letters, drop=True).tolist() == [97, IMAGE, 99, IMAGE]
    assert encode("abc", "<image>", letters).tolist() == [97, 98, 99]
