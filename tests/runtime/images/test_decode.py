"""Images to pixel values: published data, every kind of file that is accepted, and every kind that is refused."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from engines.errors import BackendError, OptionError, PromptError
from runtime.images import decode as images
from runtime.images.tiling import lay_out, mode_for
from tests.support.cases import refused, sentence
from tests.support.goldens import DATA
from tests.support.vision import CASES, FILES, NEWER, REAL, TINY, close

# Published data


@pytest.mark.parametrize("case", CASES)
def test_pixel_values(case: str, stored: dict[str, NDArray[Any]]) -> None:
    pixels, wanted = images.load(TINY, FILES[case]).pixels, stored[f"{case}.pixel_values"]
    assert pixels.dtype == np.float32
    if case == "waves" and NEWER:
        off = np.abs(pixels - wanted) > 1e-6
        assert off.sum() <= 541 and not off[1:].any(), "of one level, and in the base tile alone"
        wanted = np.where(off, pixels, wanted) if np.abs(pixels - wanted).max() < 1.01 / 127.5 else wanted
    close(case, pixels, wanted, 1e-6)


def test_pixel_values_of_several_padded_images(stored: dict[str, NDArray[Any]]) -> None:
    pictures = [images.load(TINY, FILES[case], "pad") for case in ("gradient", "checker")]
    close("pad", np.concatenate([p.pixels for p in pictures]), stored["two_pad.pixel_values"], 1e-6)
    assert [p.tokens for p in pictures] == [16, 16] and lay_out(TINY, (300, 120), "pad_newline").tokens == 17
    assert [mode_for(count) for count in (1, 2, 3)] == ["anyres", "pad", "pad"]


@pytest.mark.parametrize("case", ["gradient", "checker"])
def test_pixel_values_at_the_real_size(case: str, stored: dict[str, NDArray[Any]]) -> None:
    small = Image.open(FILES[case])
    large = small.resize((small.width * 5, small.height * 5), Image.Resampling.NEAREST)
    pixels = images.load(REAL, large).pixels[:, :, 5::53, 5::53]
    close(case, pixels, stored[f"real384.{case}_x5.pixel_values_sampled"], 1.01 / 127.5 if NEWER else 1e-6)


# Kinds of images


def png(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


PLAIN = Image.open(FILES["gradient"]).convert("RGB")


def painted(form: str = "PNG", **options: Any) -> Callable[[Image.Image], bytes]:
    return lambda image: png(image, form, **options)


def kinds() -> dict[str, tuple[bytes, Image.Image]]:
    """Bytes, and the picture that a viewer shows."""
    grey, palette = PLAIN.convert("L"), PLAIN.quantize(16)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 0x101)
    glass = PLAIN.copy()
    glass.putalpha(0)
    hole = palette.copy()
    hole.info["transparency"] = 3
    shown = hole.convert("RGBA")
    shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise
    wide = PLAIN.crop((0, 0, 100, 60))
    cmyk = png(PLAIN.convert("CMYK"), "TIFF")
    return {
        "grey": (png(grey), grey.convert("RGB")), "1 bit": (png(grey.convert("1")), grey.convert("1").convert("RGB")),
        "grey and alpha": (png(Image.merge("LA", [grey, Image.new("L", grey.size, 255)])), grey.convert("RGB")),
        "palette": (png(palette), palette.convert("RGB")), "16 bits": (png(deep), grey.convert("RGB")),
        "16 bits, big end first": (png(deep, "TIFF"), grey.convert("RGB")),
        "transparent": (png(glass), Image.new("RGB", PLAIN.size, "white")),
        "palette with a hole": (png(hole, transparency=3), shown.convert("RGB")),
        "CMYK": (cmyk, PLAIN.convert("CMYK").convert("RGB")),
        "EXIF": (png(wide, exif=turned), wide.transpose(Image.Transpose.ROTATE_270)),
        "WebP": (png(PLAIN, "WEBP", lossless=True), PLAIN), "BMP": (png(PLAIN, "BMP"), PLAIN),
        "GIF of one frame": (png(palette, "GIF"), palette.convert("RGB")),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(kinds()))
def test_kinds_that_are_taken(kind: str) -> None:
    """Whatever the file holds, the pixels are those that a viewer shows."""
    content, shown = kinds()[kind]
    found = images.decode(content)
    assert found.mode == "RGB" and found.size == shown.size
    assert np.array_equal(np.asarray(found), np.asarray(shown))
    picture = images.load(TINY, content)
    assert (
        np.array_equal(picture.pixels, images.load(TINY, shown).pixels) and len(picture.pixels) == picture.layout.tiles
    )


def test_a_photo_with_its_preview() -> None:
    """Two images in a JPEG are one photo."""
    content = png(PLAIN, "MPO", save_all=True, append_images=[PLAIN.resize((10, 10))])
    assert images.decode(content).size == PLAIN.size
    assert ImageOps.exif_transpose(PLAIN).size == PLAIN.size


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def claimed(width: int, height: int) -> bytes:
    """A PNG of few bytes that claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


FRAMES = [PLAIN.resize((20, 20)), PLAIN.transpose(Image.Transpose.ROTATE_90).resize((20, 20))]
BROKEN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "not an image": (b"GIF or so it says", ("not a readable image in PNG, JPEG", "save it")),
    "empty": (b"", ("not a readable image in PNG",)),
    "PostScript, which starts a program": (png(PLAIN, "EPS"), ("not a readable image in PNG",)),
    "cut off": (png(PLAIN)[:300], ("cannot be decoded", "again as PNG")),
    "damaged": (png(PLAIN).replace(b"IDAT", b"IDAX"), ("not a readable image in PNG",)),
    "a JPEG that is cut off": (png(PLAIN, "JPEG")[:500], ("cannot be decoded",)),
    "a bomb": (claimed(60_000, 60_000), ("more than 100,000,000 pixels", "scale it down")),
    "a smaller bomb": (claimed(12_000, 9_000), ("12000 × 9000 pixels", "more than 100,000,000", "scale it down")),
    "animated": (png(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), ("2 frames", "as PNG")),
    "animated PNG": (png(FRAMES[0], save_all=True, append_images=FRAMES[1:]), ("2 frames",)),
    "pages": (png(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), ("2 frames or pages",)),
    "fractions": (png(PLAIN.convert("F"), "TIFF"), ("floating-point", "as PNG")),
    "32 bits": (png(Image.fromarray(np.full((20, 20), 70_000, np.int32)), "TIFF"), ("more than 16 bits",)),
    "narrow": (png(Image.new("RGB", (3000, 2))), ("3000 × 2 pixels", "too narrow", "crop it")),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_images_that_are_refused(kind: str, tmp_path: Path) -> None:
    content, words = BROKEN[kind]
    with refused(PromptError, *words):
        images.load(TINY, content)
    (tmp_path / "picture.png").write_bytes(content)
    with refused(PromptError, *words) as _:
        images.load(TINY, tmp_path / "picture.png")
    if kind != "narrow":
        with pytest.raises(PromptError, match=r"picture\.png"):
            images.load(TINY, str(tmp_path / "picture.png"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_damage_anywhere_is_a_sentence(form: str) -> None:
    """Bytes changed or cut off at random: an image, or one kind of error."""
    rng, content, refusals = np.random.default_rng(1), png(PLAIN.resize((30, 20)), form), 0
    for number in range(150):
        damaged = bytearray(content[: rng.integers(1, len(content))] if number % 5 == 0 else content)
        for place in rng.integers(0, len(damaged), 1 + number % 4):
            damaged[place] = rng.integers(256)
        try:
            assert images.decode(bytes(damaged)).mode == "RGB"
        except PromptError as error:
            sentence(str(error), "the image", ";")
            refusals += 1
    assert refusals > 10


def test_paths_that_are_no_images(tmp_path: Path) -> None:
    with refused(PromptError, "there is no image", "nowhere.png", "check its path"):
        images.load(TINY, tmp_path / "nowhere.png")
    with refused(PromptError, str(tmp_path), "cannot be decoded"):
        images.load(TINY, tmp_path)
    with refused(OptionError, "'squash'", "anyres, pad, pad_newline"):
        images.load(TINY, FILES["gradient"], "squash")


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules import; reading an image names what to install."""
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with refused(BackendError, "Pillow", "not installed", "pip install 'elastic-diffusion[vision]'"):
        images.load(TINY, FILES["gradient"])
    code = "import sys; sys.modules['PIL'] = None; import runtime.images.decode, runtime.images.prompt, runtime.cli"
    done = subprocess.run([sys.executable, "-c", code], cwd=DATA.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
