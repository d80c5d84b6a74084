"""Weight files: what their header says of each tensor, and files that are none."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from engines.errors import BundleError
from engines.weights import Entry, locate
from tests.support.cases import refused


def test_where_tensors_are(tmp_path: Path) -> None:
    tensors: dict[str, NDArray[Any]] = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.float16),
    }
    path = tmp_path / "w.safetensors"
    save_file(tensors, path, metadata={"format": "np"})
    found = locate(path)
    assert {name: (entry.dtype, entry.shape) for name, entry in found.items()} == {
        "a.weight": ("fp32", (2, 3)), "b": ("fp16", (4,)),
    }  # fmt: skip
    raw = path.read_bytes()
    for name, array in tensors.items():
        entry: Entry = found[name]
        assert raw[entry.offset : entry.offset + entry.length] == array.tobytes()


def test_weight_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for content in (b"", b"\xff" * 16, (5).to_bytes(8, "little") + b"[[[[[", (2).to_bytes(8, "little") + b"[]",
                    (13).to_bytes(8, "little") + b'{"a": [1, 2]}'):  # fmt: skip
        path.write_bytes(content)
        with refused(BundleError, str(path), "not a readable weight file"):
            locate(path)
