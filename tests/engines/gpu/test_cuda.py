"""The calls of CUDA's runtime API, without a GPU: they are recorded, not made."""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.errors import BackendError
from engines.gpu.cuda import Cuda
from tests.support.cases import refused


def without_gpu(**api: Any) -> Cuda:
    """A `Cuda` whose runtime API is `api`."""
    cuda = object.__new__(Cuda)
    cuda.stream, cuda.owned, cuda.hosts = 7, [], set()
    cuda.device, cuda.thread, cuda.capturing = 0, threading.get_ident(), False
    cuda.api = SimpleNamespace(**api)
    return cuda


def test_a_copy_through_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte x of row y of plane z is at pointer + (z · ysize + y) · pitch + x, as in the fake."""
    runtime_api = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python; scripts/setup.sh installs it")
    cuda, seen = without_gpu(**vars(runtime_api)), []
    monkeypatch.setattr(cuda, "call", lambda name, *arguments: seen.append((name, *arguments)))
    cuda.copy_planes(4096, 2, 3, 8193, 8, 6, 2, 3, 2)
    ((name, copy, stream),) = seen
    assert (name, stream) == ("cudaMemcpy3DAsync", 7)
    assert (int(copy.dstPtr.ptr), copy.dstPtr.pitch, copy.dstPtr.ysize) == (4096, 2, 3)
    assert (int(copy.srcPtr.ptr), copy.srcPtr.pitch, copy.srcPtr.ysize) == (8193, 8, 6)
    assert (copy.extent.width, copy.extent.height, copy.extent.depth) == (2, 3, 2)
    assert copy.kind == runtime_api.cudaMemcpyKind.cudaMemcpyDeviceToDevice


def test_out_of_memory_names_what_and_a_remedy() -> None:
    full = SimpleNamespace(cudaSuccess=0)
    cuda = without_gpu(cudaMalloc=lambda size: (2, 0), cudaError_t=full, cudaMemGetInfo=lambda: (0, 10**9, 8 * 10**9))
    with refused(BackendError, "the cache of K of 16 sequences needs 2.50 GB", "1.00 of 8.00 GB", "fewer prompts"):
        cuda.alloc(2_500_000_000, "the cache of K of 16 sequences")
    assert not cuda.owned


def test_memory_of_either_kind_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, seen = without_gpu(), []
    host = np.zeros(8, np.uint8)

    def call(name: str, *_: Any) -> int:
        seen.append(name)
        return host.ctypes.data

    monkeypatch.setattr(cuda, "call", call)
    cuda.owned.append(5)
    assert (cuda.pinned(8) == 0).all() and cuda.owned == [5, host.ctypes.data]
    monkeypatch.setattr(cuda, "sync", lambda: None)
    cuda.close()
    assert seen == ["cudaMallocHost", "cudaFreeHost", "cudaFree", "cudaStreamDestroy"] and not cuda.hosts
