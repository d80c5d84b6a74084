"""Tiles and tokens of an image: geometry against published data, and counts of any size."""

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.errors import PromptError
from runtime.images import decode as images
from runtime.images.prompt import IMAGE
from runtime.images.tiling import arrange, lay_out
from tests.support.vision import CASES, FILES, GOLDEN, REAL, TINY, close, prompts, tower


def test_geometry_of_the_real_size() -> None:
    rows = json.loads((GOLDEN / "real_geometry.json").read_text())["rows"]
    assert len(rows) == 21 and REAL.tiles == 37 and REAL.patches == 729
    for row in rows:
        found = lay_out(REAL, tuple(row["image_size_wh"]))
        came = {
            "best_resolution_wh": [384 * n for n in found.grid], "grid_wh": list(found.grid),
            "tiles_plus_base": found.tiles, "tokens": found.tokens, "base_tokens": found.patches,
            "rows": found.rows, "columns_without_newline": found.columns,
        }  # fmt: skip
        assert came == {key: row[key] for key in came}, row["image_size_wh"]


def test_geometry_of_the_tiny_size() -> None:
    for case in CASES:
        golden = prompts()[case]
        found = lay_out(TINY, tuple(golden["image_size_wh"]))
        assert [list(found.grid), found.tiles, found.tokens] == [
            golden["grid_wh"], golden["tiles_plus_base"], golden["image_tokens"],
        ], case  # fmt: skip
        ids = np.array(golden["input_ids"])
        assert int((ids != IMAGE).sum()) + found.tokens == golden["merged_length"]


@pytest.mark.parametrize("case", CASES)
def test_tiles_become_tokens(case: str, stored: dict[str, NDArray[Any]]) -> None:
    layout = images.load(TINY, FILES[case]).layout
    wanted = stored[f"{case}.image_tokens"]
    newline = wanted[-1]  # the last row ends with it
    came = arrange(layout, stored[f"{case}.projected"], newline)
    assert came.dtype == np.float32
    close(case, came, wanted, 1e-5)


def test_every_size_gives_as_many_tokens_as_it_says() -> None:
    """Rounding leaves no row too many: the tokens are counted before there are any."""
    rng = np.random.default_rng(0)
    small = tower(28)
    for _ in range(200):
        size = (int(rng.integers(1, 900)), int(rng.integers(1, 900)))
        try:
            layout = lay_out(small, size)
        except PromptError:
            assert max(size) / min(size) > 6, size  # with two patches a tile
            continue
        tokens = arrange(layout, np.zeros((layout.tiles, 4, 2), np.float32), np.ones(2, np.float32))
        assert len(tokens) == layout.tokens, size
        assert (tokens[:, 0] == 1).sum() == layout.newlines == layout.rows
