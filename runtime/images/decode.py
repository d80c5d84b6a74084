"""From an image file, bytes or a Pillow image to the pixel values of its tiles.

Pillow decodes and resizes; it is imported when the first image is read. An image is rotated as its EXIF data say,
transparent pixels are blended with white, and every colour model becomes RGB of 8 bits.
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

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # decoders of other formats may start external programs
PIXELS = 100_000_000  # a larger image is refused before it is decoded
Source: TypeAlias = Union[str, Path, bytes, "Image"]
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """An image ready for a vision tower: its layout and the pixel values of its tiles, the base tile first."""

    layout: Layout
    # [N, 3, side, side]
    pixels: Pixels

    @property
    def tokens(self) -> int:
        """Rows of the language model that the image takes."""
        return self.layout.tokens


def load(vision: VisionConfig, source: Source, mode: str = "anyres") -> Picture:
    """Decode an image and cut it into tiles; `mode` is one of `tiling.MODES`.

    Raises PromptError if the source cannot be decoded or is not supported, BackendError if Pillow is not installed.
    """
    image = decode(source)
    layout = lay_out(vision, image.size, mode)
    return Picture(layout, np.stack([normalised(vision, tile) for tile in tiles(vision, image, layout)]))


def pillow() -> Any:
    """The module PIL; raises BackendError if it is not installed."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise BackendError(f"images need Pillow, which is not installed; {INSTALL.format(extra='vision')}") from error
    return PIL


def decode(source: Source) -> "Image":
    """Decode a file, bytes or a Pillow image to an upright RGB image; raises PromptError if that is not possible."""
    pil = pillow()
    name = str(source) if isinstance(source, str | Path) else "the image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, which are checked below, and metadata
            if isinstance(source, pil.Image.Image):
                return converted(pil, source, name)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with pil.Image.open(file, formats=FORMATS) as image:
                return converted(pil, image, name)
    except PromptError:
        raise
    except pil.UnidentifiedImageError as error:
        raise PromptError(f"{name} is not a readable image in {', '.join(FORMATS)}; save it as PNG") from error
    except pil.Image.DecompressionBombError as error:
        raise PromptError(f"{name} has more than {PIXELS:,} pixels; scale it down") from error
    except FileNotFoundError as error:
        raise PromptError(f"there is no image {name}; check its path") from error
    except Exception as error:  # Pillow raises many types for damaged files
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise PromptError(f"{name} cannot be decoded ({reason}); save it again as PNG") from error


def converted(pil: Any, image: Any, name: str) -> "Image":
    """Convert to upright RGB of 8 bits; raises PromptError for an image that is not supported."""
    width, height = image.size
    if width * height > PIXELS:
        raise PromptError(f"{name} has {width} × {height} pixels, more than {PIXELS:,}; scale it down")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a photo with its preview, or a stereo pair
        raise PromptError(f"{name} has {frames} frames or pages, and one is supported; save one of them as PNG")
    upright = pil.ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise PromptError(f"{name} has floating-point pixels without a defined range; save it as PNG")
    if upright.mode.startswith("I"):  # 16 bits per pixel; Pillow may hold them as 32
        values = np.asarray(upright).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
            raise PromptError(f"{name} has pixels of more than 16 bits; save it as PNG of 8 or 16 bits")
        upright = pil.Image.fromarray((values // 0x101).astype(np.uint8))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = pil.Image.alpha_composite(pil.Image.new("RGBA", upright.size, "white"), upright)
    found: Image = upright.convert("RGB")
    return found


def tiles(vision: VisionConfig, image: "Image", layout: Layout) -> list["Image"]:
    """The base tile (the whole image), then the grid's tiles row by row; each is [side, side] RGB."""
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
    """The image centred in a `frame` (width, height) of one grey level."""
    background: Image = pillow().Image.new("RGB", frame, (grey,) * 3)
    background.paste(image, ((frame[0] - image.width) // 2, (frame[1] - image.height) // 2))
    return background


def normalised(vision: VisionConfig, tile: "Image") -> Pixels:
    """Pixel values [3, side, side], float32: scaled to 0 … 1, minus the mean, over the deviation."""
    values = np.asarray(tile, np.float32).transpose(2, 0, 1) / np.float32(255)
    return (values - np.float32(vision.mean)) / np.float32(vision.deviation)
