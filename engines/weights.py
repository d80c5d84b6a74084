"""The weight file of a part: safetensors, which ONNX reads as external data.

One file serves both readers: ONNX Runtime and TensorRT find each tensor by
offset and length, the eager back end by name. Files are written and hashed in
chunks, so that a large matrix can be cast and transposed with little memory.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engines.errors import BundleError

SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
CODES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
NAMES = {code: name for name, code in CODES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is in its file: element type, shape, offset in the file and length, both in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class HashedFile:
    """A file that is written in chunks and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0  # bytes written so far
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, chunk: bytes | memoryview) -> None:
        """Append contiguous bytes; raises OSError as the disk does."""
        self._file.write(chunk)
        self._digest.update(chunk)
        self.size += len(chunk)

    @property
    def entry(self) -> dict[str, Any]:
        """The manifest's entry of what was written: size in bytes and SHA-256 (hex)."""
        return {"size": self.size, "sha256": self._digest.hexdigest()}


@contextmanager
def writer(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Iterator[HashedFile]:
    """Begin the safetensors file `path`; the body writes the tensors' bytes in row-major order, one after the other.

    `tensors` maps each name to (element type, shape). Raises OSError as the disk does.
    """
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # aligned rows let a reader map the file as it is
    with path.open("wb") as file:
        hashed = HashedFile(file)
        hashed.write(len(text).to_bytes(8, "little") + text)
        yield hashed
    assert hashed.size == 8 + len(text) + end, f"{path.name}: chunks do not add up to the header's sizes"


def locate(path: Path) -> dict[str, Entry]:
    """The entries of a weight file, read from its header alone; raises BundleError, without a remedy, if it is none."""
    try:
        with path.open("rb") as file:
            header, start = _header(file)
        return {
            name: Entry(
                dtype=NAMES[item["dtype"]],
                shape=tuple(item["shape"]),
                offset=start + item["data_offsets"][0],
                length=item["data_offsets"][1] - item["data_offsets"][0],
            )
            for name, item in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: not a readable weight file ({error})") from error


def _header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the offset at which the data begins."""
    size = int.from_bytes(file.read(8), "little")
    if size > 100_000_000:
        raise ValueError("the header's length is implausible")
    header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size
