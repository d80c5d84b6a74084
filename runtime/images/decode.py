"""Images in: from a file or bytes to the pixel values of its tiles.

Pillow decodes and resizes; it is imported when the first image is read. An
image is turned as its EXIF data say, transparency is laid on white, and every
colour model becomes RGB of 8 bits. Nothing here knows a model, or what becomes
of a tile.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
from numpy.typing import NDArray

from engines.config import VisionConfig
from engines.errors import INSTALL, BackendError, PromptError
from runtime.images.tiling import Layout, fitted, lay_out

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # others have decoders that start programs, or worse
PIXELS = 100_000_000  # an image of more is refused before it is decoded
Source: TypeAlias = Union[str, Path, bytes, "Image"]
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """An image ready for a vision tower: its layout, and the `pixels` [N, 3, S, S] of its tiles, the base first."""

    layout: Layout
    pixels: Pixels

    @property
    def tokens(self) -> int:
        return self.layout.tokens


def load(vision: VisionConfig, source: Source, mode: str = "anyres") -> Picture:
    """Decode an image and cut it into tiles; `mode` is one of `layout.MODES`.

    Raises PromptError for what is no image, or one that is not taken, BackendError where Pillow is missing.
    """
    image = decode(source)
    layout = lay_out(vision, image.size, mode)
    return Picture(layout, np.stack([normalised(vision, tile) for tile in tiles(vision, image, layout)]))


def pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise BackendError(f"images need Pillow, which is not installed; {INSTALL.format(extra='vision')}") from error
    return PIL


def decode(source: Source) -> "Image":
    """The image in a file, in bytes or as Pillow holds it, upright and in RGB."""
    pil = pillow()
    what = str(source) if isinstance(source, str | Path) else "the image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked here, and of metadata
            if isinstance(source, pil.Image.Image):
                return converted(pil, source, what)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with pil.Image.open(file, formats=FORMATS) as image:
                return converted(pil, image, what)
    except PromptError:
        raise
    except pil.UnidentifiedImageError as error:
        raise PromptError(f"{what} is no image in {', '.join(FORMATS)} that can be read; save it as PNG") from error
    except pil.Image.DecompressionBombError as error:
        raise PromptError(f"{what} has more than {PIXELS:,} pixels; scale it down") from error
    except FileNotFoundError as error:
        raise PromptError(f"there is no image {what}; check its path") from error
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise PromptError(f"{what} cannot be decoded ({reason}); save it again as PNG") from error


def converted(pil: Any, image: Any, what: str) -> "Image":
    """RGB of 8 bits, turned upright; raises PromptError for an image that is not taken."""
    width, height = image.size
    if width * height > PIXELS:
        raise PromptError(f"{what} has {width} × {height} pixels, more than {PIXELS:,}; scale it down")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photo with its preview, or its other eye
        raise PromptError(f"{what} has {frames} frames or pages; save the one that is meant as PNG")
    upright = pil.ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise PromptError(f"{what} has fractions for pixels, whose white nobody says; save it as PNG")
    if upright.mode.startswith("I"):  # 16 bits a pixel, whatever the container of the file makes of it
        values = np.asarray(upright).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
            raise PromptError(f"{what} has pixels of more than 16 bits; save it as PNG of 8 or 16 bits")
        upright = pil.Image.fromarray((values // 0x101).astype(np.uint8))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = pil.Image.alpha_composite(pil.Image.new("RGBA", upright.size, "white"), upright)
    found: Image = upright.convert("RGB")
    return found


def tiles(vision: VisionConfig, image: "Image", layout: Layout) -> list["Image"]:
    """Squares of the tower's size: the whole image, then its tiles row by row."""
    pil, side = pillow(), vision.image_size
    bicubic = pil.Image.Resampling.BICUBIC
    if layout.grid == (0, 0):
        grey = int(255 * vision.mean)
        return [framed(image, (max(image.size),) * 2, grey).resize((side, side), bicubic)]
    frame = layout.grid[0] * side, layout.grid[1] * side
    large = framed(image.resize(fitted(image.size, frame), bicubic), frame, 0)
    corners = [(x, y) for y in range(0, frame[1], side) for x in range(0, frame[0], side)]
    return [image.resize((side, side), bicubic), *(large.crop((x, y, x + side, y + side)) for x, y in corners)]


def framed(image: "Image", frame: tuple[int, int], grey: int) -> "Image":
    """The image in the middle of a frame of one colour."""
    ground: Image = pillow().Image.new("RGB", frame, (grey,) * 3)
    ground.paste(image, ((frame[0] - image.width) // 2, (frame[1] - image.height) // 2))
    return ground


def normalised(vision: VisionConfig, tile: "Image") -> Pixels:
    """[3, S, S]: values in 0 … 1, the mean taken off, over the deviation."""
    values = np.asarray(tile, np.float32).transpose(2, 0, 1) / np.float32(255)
    return (values - np.float32(vision.mean)) / np.float32(vision.deviation)
