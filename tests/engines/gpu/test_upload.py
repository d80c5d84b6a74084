"""Weights on their way to the GPU: whole, aligned, in one allocation for each part."""

from pathlib import Path

import numpy as np
import pytest

from engines.errors import BackendError
from engines.gpu.cuda import ALIGNMENT
from engines.gpu.upload import Uploader
from engines.weights import writer
from tests.support.cases import refused
from tests.support.fake_gpu import FakeCuda


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A weight file with tensors that are smaller, larger and a multiple of a piece."""
    rng = np.random.default_rng(0)
    tensors = {f"t{size}": rng.normal(size=size).astype(np.float32) for size in (3, 256, 250, 1, 640)}
    path = tmp_path / "w.safetensors"
    with writer(path, {name: ("fp32", array.shape) for name, array in tensors.items()}) as out:
        for array in tensors.values():
            out.write(array.tobytes())
    return path, tensors


def test_every_tensor_arrives(file: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, tensors = file
    cuda = FakeCuda()
    uploader = Uploader(cuda, piece=1024)
    before = len(cuda.owned)
    bindings = uploader.upload(path, "layer_00")
    assert len(cuda.owned) == before + 1, "one allocation"
    for name, array in tensors.items():
        address, shape = bindings[name]
        assert address % ALIGNMENT == 0 and shape == array.shape
        assert np.array_equal(cuda.at(address, array.nbytes).view(np.float32), array)
    assert cuda.counts["upload"] == sum(-(-array.nbytes // 1024) for array in tensors.values())
    uploader.close()
    assert len(cuda.owned) == 1


def test_what_does_not_fit(file: tuple[Path, dict[str, np.ndarray]]) -> None:
    cuda = FakeCuda()
    uploader = Uploader(cuda, piece=1024)
    cuda.limit = 4096
    with refused(BackendError, "out of GPU memory", "the weights of head"):
        uploader.upload(file[0], "head")


def test_a_file_that_is_cut_while_it_is_read(
    file: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = file
    uploader = Uploader(FakeCuda(), piece=1024)
    upload = uploader.cuda.upload

    def cut(target: int, source: np.ndarray) -> None:
        path.write_bytes(path.read_bytes()[:600])
        upload(target, source)

    monkeypatch.setattr(uploader.cuda, "upload", cut)
    with pytest.raises(OSError, match="ends too early"):
        uploader.upload(path, "embed")
