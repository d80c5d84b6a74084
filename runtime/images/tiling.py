"""From an image's size to its tokens: tiles, margins, rows and columns.

An image becomes a base tile, which is the whole image scaled to a square, and a grid of tiles that keep its
proportions, on a black background. The patches of the grid's tiles form one map; the background is cut off, a map above
the cap is scaled down, and a newline token follows each row. The mode `pad` makes one tile instead: the image on a grey
square. The arithmetic, rounding included, is that of the LLaVA family's published models (LLaVA-NeXT, "anyres").
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.config import VisionConfig
from engines.errors import OptionError, PromptError

MODES = ("anyres", "pad", "pad_newline")  # the last with a newline token after the tile
SLACK = 1.1  # a map is scaled down if its side is longer than the cap by this factor
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """How an image of `size` (width, height) is cut into tiles and arranged as tokens.

    `grid` (across, down) tiles follow the base tile; (0, 0) for `pad`. `top` rows and `left` columns of patches are cut
    off on both sides, and the rest is scaled to `rows` × `columns`. `newlines` tokens end the rows.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    patches: int  # P, of a tile
    top: int
    left: int
    rows: int
    columns: int
    newlines: int

    @property
    def tiles(self) -> int:
        """N: the base tile and the grid."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Rows of the language model that the image takes."""
        return self.patches + self.rows * self.columns + self.newlines


def mode_for(images: int, layout: str = "auto") -> str:
    """The mode for this number of images: `tile`, `pad` or `auto`, which pads several as the published evaluation."""
    if layout == "auto":
        layout = "tile" if images < 2 else "pad"
    return {"tile": "anyres", "pad": "pad"}[layout]


def lay_out(vision: VisionConfig, size: tuple[int, int], mode: str = "anyres") -> Layout:
    """Compute the layout of an image of `size` (width, height).

    Raises OptionError for an unknown mode, PromptError for an image so narrow that no patch remains.
    """
    if mode not in MODES:
        raise OptionError(f"unknown image mode {mode!r}; choose from {', '.join(MODES)}")
    if mode != "anyres":
        newlines = int(mode == "pad_newline")
        return Layout(
            size=size, grid=(0, 0), patches=vision.patches, top=0, left=0, rows=0, columns=0, newlines=newlines
        )
    resolution = best_resolution(size, vision.resolutions)
    across, down = (side // vision.image_size for side in resolution)
    width, height = across * vision.grid, down * vision.grid
    left, top = margins(size, (width, height))
    width, height = width - 2 * left, height - 2 * top
    times = math.sqrt(width * height / (vision.max_tiles * vision.patches))
    rows, columns = (int(height // times), int(width // times)) if times > SLACK else (height, width)
    if rows < 1 or columns < 1:
        raise PromptError(f"an image of {size[0]} × {size[1]} pixels is too narrow, no patch of it remains; crop it")
    return Layout(
        size=size, grid=(across, down), patches=vision.patches, top=top, left=left, rows=rows, columns=columns,
        newlines=rows,
    )  # fmt: skip


def best_resolution(size: tuple[int, int], resolutions: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The first resolution that keeps most of the image's pixels and, among these, adds the least background."""
    width, height = size

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=merit)


def fitted(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """The largest size (width, height) of the image within a frame, its shorter side rounded up."""
    (width, height), (frame_width, frame_height) = size, frame
    across, down = frame_width / width, frame_height / height
    if across < down:
        return frame_width, min(math.ceil(height * across), frame_height)
    return min(math.ceil(width * down), frame_width), frame_height


def margins(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows of background on each side of the image in a map of patches, rounded down."""
    (width, height), (columns, rows) = size, frame
    if width / height > columns / rows:
        return 0, (rows - int(height * (columns / width))) // 2
    return (columns - int(width * (rows / height))) // 2, 0


def arrange(layout: Layout, projected: Rows, newline: Rows) -> Rows:
    """Arrange the rows of an image's tiles [N, P, d], the base tile first, as its tokens [tokens, d], float32.

    `newline` [d] is the token after each row of the grid's map.
    """
    tiles, patches, d = projected.shape
    assert tiles == layout.tiles and patches == layout.patches, "the tiles do not belong to this layout"
    base = projected[0]
    if layout.grid == (0, 0):
        return np.concatenate([base, np.tile(newline, (layout.newlines, 1))]).astype(np.float32)
    across, down = layout.grid
    side = math.isqrt(patches)
    grid = projected[1:].reshape(down, across, side, side, d).swapaxes(1, 2).reshape(down * side, across * side, d)
    # [rows, columns, d] of patches, without the background
    kept = grid[layout.top : len(grid) - layout.top, layout.left : grid.shape[1] - layout.left]
    scaled = resample(resample(kept, layout.rows, 0), layout.columns, 1)
    ends = np.broadcast_to(newline, (layout.rows, 1, d))
    return np.concatenate([base, np.concatenate([scaled, ends], 1).reshape(-1, d)]).astype(np.float32)


def resample(values: Rows, count: int, axis: int) -> Rows:
    """Resample an axis to `count` values: linear between the centres of the old values, constant outside them."""
    old = values.shape[axis]
    if count == old:
        return values
    positions = np.clip((np.arange(count) + 0.5) * (old / count) - 0.5, 0, old - 1)
    before = positions.astype(np.int64)
    after = np.minimum(before + 1, old - 1)
    fraction = (positions - before).astype(np.float32).reshape([-1 if n == axis else 1 for n in range(values.ndim)])
    mixed: Rows = np.take(values, before, axis) * (1 - fraction) + np.take(values, after, axis) * fraction
    return mixed
