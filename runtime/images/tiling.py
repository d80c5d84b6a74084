"""From an image's size to its place among the tokens: tiles, what is cut off, rows and columns.

An image becomes a base tile, the whole of it without its proportions, and a grid
of tiles that keep them, on a black ground. The tiles' patches are put together
to one map; the ground is cut off, a map beyond the cap is scaled down, and a
token follows each row. `pad` instead makes one tile of an image on a grey
square. The arithmetic is that of the LLaVA family's published models, rounding
included. Nothing here knows pixels, files or a model.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.config import VisionConfig
from engines.errors import OptionError, PromptError

MODES = ("anyres", "pad", "pad_newline")  # the last with a token after the tile
SLACK = 1.1  # a map is scaled down if its side is that much too long
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """How an image of `size` (width, height) is cut and what becomes of it.

    `grid` (across, down) tiles follow the base tile, none for `pad`; `top` and
    `left` rows and columns of patches are cut off on both sides, and what is
    left is scaled to `rows` × `columns`. `newlines` tokens come in between.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    patches: int  # of a tile
    top: int
    left: int
    rows: int
    columns: int
    newlines: int

    @property
    def tiles(self) -> int:
        return 1 + self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Rows of the language model that the image takes, known without running any part."""
        return self.patches + self.rows * self.columns + self.newlines


def mode_for(images: int) -> str:
    """How images are cut unless somebody says otherwise: several are padded, as the published evaluation does."""
    return "anyres" if images < 2 else "pad"


def lay_out(vision: VisionConfig, size: tuple[int, int], mode: str = "anyres") -> Layout:
    """The layout of an image of `size` (width, height).

    Raises OptionError for an unknown mode, PromptError for an image so narrow that no patch of it is left.
    """
    if mode not in MODES:
        raise OptionError(f"unknown way to cut an image {mode!r}; choose from {', '.join(MODES)}")
    if mode != "anyres":
        return Layout(size, (0, 0), vision.patches, 0, 0, 0, 0, int(mode == "pad_newline"))
    resolution = best_resolution(size, vision.resolutions)
    across, down = (side // vision.image_size for side in resolution)
    width, height = across * vision.grid, down * vision.grid
    left, top = ground(size, (width, height))
    width, height = width - 2 * left, height - 2 * top
    times = math.sqrt(width * height / (vision.max_tiles * vision.patches))
    rows, columns = (int(height // times), int(width // times)) if times > SLACK else (height, width)
    if rows < 1 or columns < 1:
        raise PromptError(f"an image of {size[0]} × {size[1]} pixels is too narrow: nothing is left of it; crop it")
    return Layout(size, (across, down), vision.patches, top, left, rows, columns, rows)


def best_resolution(size: tuple[int, int], resolutions: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The resolution that keeps most of the image's pixels, of equal ones the one with the least ground; the first."""
    width, height = size

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=merit)


def fitted(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """The size (width, height) of the image in a frame, which it fills in one direction; rounded up in the other."""
    (width, height), (frame_width, frame_height) = size, frame
    across, down = frame_width / width, frame_height / height
    if across < down:
        return frame_width, min(math.ceil(height * across), frame_height)
    return min(math.ceil(width * down), frame_width), frame_height


def ground(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows of a map that lie beside the image, on each side; rounded so that some of it may stay."""
    (width, height), (columns, rows) = size, frame
    if width / height > columns / rows:
        return 0, (rows - int(height * (columns / width))) // 2
    return (columns - int(width * (rows / height))) // 2, 0


def arrange(layout: Layout, projected: Rows, newline: Rows) -> Rows:
    """The image's tokens [n, d] from its tiles [N, P, d], the base tile first, and the token [d] that ends a row."""
    tiles, patches, d = projected.shape
    assert tiles == layout.tiles and patches == layout.patches, "the tiles are another image's"
    base = projected[0]
    if layout.grid == (0, 0):
        return np.concatenate([base, np.tile(newline, (layout.newlines, 1))]).astype(np.float32)
    across, down = layout.grid
    side = math.isqrt(patches)
    whole = projected[1:].reshape(down, across, side, side, d).swapaxes(1, 2).reshape(down * side, across * side, d)
    kept = whole[layout.top : len(whole) - layout.top, layout.left : whole.shape[1] - layout.left]
    scaled = resample(resample(kept, layout.rows, 0), layout.columns, 1)
    ends = np.broadcast_to(newline, (layout.rows, 1, d))
    return np.concatenate([base, np.concatenate([scaled, ends], 1).reshape(-1, d)]).astype(np.float32)


def resample(values: Rows, count: int, axis: int) -> Rows:
    """`count` values along an axis, linear between the centres of the old ones; equal beyond the outermost."""
    old = values.shape[axis]
    if count == old:
        return values
    places = np.clip((np.arange(count) + 0.5) * (old / count) - 0.5, 0, old - 1)
    before = places.astype(np.int64)
    after = np.minimum(before + 1, old - 1)
    share = (places - before).astype(np.float32).reshape([-1 if n == axis else 1 for n in range(values.ndim)])
    mixed: Rows = np.take(values, before, axis) * (1 - share) + np.take(values, after, axis) * share
    return mixed
