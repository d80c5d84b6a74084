"""Does the CUDA layer do what it says: copies of every kind, captures that work and that break, large graphs."""

import time
from functools import partial
from typing import Any

import numpy as np

from engines.errors import BackendError
from engines.gpu.cuda import Cuda
from scripts.gpu.report import timed

NODES = 1_420  # of the graph of a reuse pass of 32 layers, before it was made smaller


def bandwidth(cuda: Cuda, size: int = 1 << 30) -> dict[str, float]:
    """Bytes per second, read and written, of a copy on the device."""
    a, b = cuda.alloc(size, "a copy"), cuda.alloc(size, "a copy")
    seconds = timed(lambda: cuda.copy(a, b, size), cuda.sync)
    cuda.free(a)
    cuda.free(b)
    return {"copy_gb_per_second": 2 * size / seconds / 1e9}


def copies(cuda: Cuda) -> dict[str, bool]:
    """Strided copies of rows and of planes, compared with NumPy's."""
    source = np.arange(4 * 6 * 32, dtype=np.uint8).reshape(4, 6, 32)
    a, b = cuda.alloc(source.nbytes, "a copy"), cuda.alloc(source.nbytes, "a copy")
    found = np.empty_like(source)

    def copied(work: Any) -> np.ndarray:
        cuda.upload(a, source)
        cuda.upload(b, np.zeros_like(source))
        work()
        cuda.download(found, b)
        cuda.sync()
        return found.copy()

    rows = copied(lambda: cuda.copy_rows(b, 32, a, 64, 8, 10))  # every second row, 8 bytes of each
    expected = np.zeros((24, 32), np.uint8)
    expected[:10, :8] = source.reshape(24, 32)[:20:2, :8]
    planes = copied(lambda: cuda.copy_planes(b + 2 * 32, 32, 6, a + 32, 32, 6, 16, 3, 4))  # rows 1-3 to 2-4
    wanted = np.zeros_like(source)
    wanted[:, 2:5, :16] = source[:, 1:4, :16]
    for address in (a, b):
        cuda.free(address)
    return {
        "rows": bool((rows.reshape(24, 32) == expected).all()), "planes": bool((planes == wanted).all()),
        "aligned": a % 256 == 0 and b % 256 == 0,
    }  # fmt: skip


def captures(cuda: Cuda) -> dict[str, Any]:
    """A graph replays its work; a capture that breaks keeps its first error, and the stream goes on."""
    a, b = cuda.alloc(256, "a copy"), cuda.alloc(256, "a copy")
    value = np.zeros(256, np.uint8)
    graph = cuda.capture(lambda: cuda.copy(b, a, 256))
    replayed = []
    for number in (1, 2):
        cuda.upload(a, np.full(256, number, np.uint8))
        cuda.launch(graph)
        cuda.download(value, b)
        cuda.sync()
        replayed.append(bool((value == number).all()))
    cuda.destroy(graph)
    try:
        cuda.capture(cuda.sync)
        broken = "a wait was captured"
    except BackendError as error:
        broken = str(error)
    cuda.upload(a, np.full(256, 3, np.uint8))
    cuda.download(value, a)
    cuda.sync()
    return {"replayed": replayed, "first_error": broken, "stream_goes_on": bool((value == 3).all())}


def large_graph(cuda: Cuda) -> dict[str, float]:
    """Memory and times of a graph of as many nodes as a pass had, each a small copy."""
    a, b = cuda.alloc(256, "a copy"), cuda.alloc(256, "a copy")

    def work() -> None:
        for _ in range(NODES):
            cuda.copy(b, a, 256)

    free, began = cuda.memory()[0], time.perf_counter()
    graph = cuda.capture(work)
    captured = time.perf_counter() - began
    launch = timed(partial(cuda.launch, graph), cuda.sync)
    alone = timed(work, cuda.sync)
    found = {
        "nodes": NODES, "capture_ms": 1e3 * captured, "launch_ms": 1e3 * launch, "without_graph_ms": 1e3 * alone,
        "device_mb": (free - cuda.memory()[0]) / 1e6,
    }  # fmt: skip
    cuda.destroy(graph)
    return found


def pytorch(slots: int = 1088, rows: int = 64, heads: int = 32, size: int = 128, vocab: int = 126464) -> dict[str, Any]:
    """Microseconds in PyTorch of what the tests are made of: scores both ways, a cast of K, an arg-max of logits."""
    import torch

    k = torch.randn(1, heads, slots, size, dtype=torch.float16, device="cuda")
    q = torch.randn(1, heads, rows, size, dtype=torch.float16, device="cuda")
    logits = torch.randn(16, vocab, dtype=torch.float16, device="cuda")
    cases = {
        "q_kt": lambda: q @ k.transpose(-1, -2), "k_qt": lambda: k @ q.transpose(-1, -2),
        "cast_of_k": lambda: k.float(), "argmax": lambda: logits.argmax(-1),
    }  # fmt: skip
    found: dict[str, Any] = {"torch": torch.__version__}
    for name, work in cases.items():
        graph = torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        work()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):  # type: ignore[no-untyped-call]
            for _ in range(10):
                work()  # type: ignore[no-untyped-call]
        found[name] = 1e5 * timed(graph.replay, torch.cuda.synchronize)
    return found
