"""The fake GPU itself: it must notice what breaks the rules of CUDA and TensorRT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from tests.support.fake_gpu import VERSION, FakeCuda, fake_gpu, module
from tests.support.gpu_models import batch_of, device, passes_of


def test_queue_and_memory() -> None:
    """Copies stay within one allocation and run at the next wait; nothing waits during a capture."""
    cuda = FakeCuda()
    address = cuda.alloc(16, "a test")
    with pytest.raises(AssertionError, match="no allocation"):
        cuda.at(address + 8, 16)
    with pytest.raises(AssertionError, match="captured"):
        cuda.capture(cuda.sync)
    host = np.zeros(4, np.float32)
    cuda.upload(address, np.ones(4, np.float32))
    cuda.download(host, address)
    assert not host.any()
    cuda.sync()
    assert host.all() and module().__version__ == VERSION


def test_planes_and_freed_graphs() -> None:
    """Copies through planes, and a freed graph that is launched."""
    cuda = FakeCuda()
    cuda.owned.clear()
    a, b = cuda.alloc(4 * 3 * 8, "a"), cuda.alloc(2 * 3 * 2, "b")
    cuda.at(a, 96)[:] = np.arange(96)
    cuda.copy_planes(b, 2, 3, a + 1, 8, 6, 2, 3, 2)
    cuda.sync()
    assert cuda.at(b, 12).tolist() == [1, 2, 9, 10, 17, 18, 49, 50, 57, 58, 65, 66]
    with pytest.raises(AssertionError, match="overlap"):
        cuda.copy_planes(b, 2, 2, a, 8, 6, 2, 3, 2)
    graph = cuda.capture(lambda: cuda.copy(b, a, 4))
    cuda.destroy(graph)
    cuda.launch(graph)
    with pytest.raises(AssertionError, match="freed graph"):
        cuda.sync()


def test_a_captured_graph_needs_its_shapes(bundle: Path) -> None:
    """A graph fails when its context has taken another shape since the capture."""
    with fake_gpu(), runtime.load(bundle, "tensorrt") as model:
        made, cuda = device(model)
        due = passes_of(model, 2)
        for _ in range(2):
            made.reuse(due)
        graph = batch_of(model).pass_queue.graphs["row", 2]
        engine: Any = made.engine("embed", due[0].runner.slots)
        context = next(kept.context for key, kept in engine.contexts.items() if key[:2] == (0, 2))
        shape, address = context.shapes["ids"], context.addresses["ids"]
        for name, value in (("shapes", (1, due[0].rows)), ("addresses", address + 256)):
            getattr(context, name)["ids"] = value
            cuda.launch(graph)
            with pytest.raises(AssertionError, match=f"other {name} now"):
                cuda.sync()
            cuda.queue.clear()
            context.shapes["ids"], context.addresses["ids"] = shape, address
        del context, engine  # as a traceback, they would keep it alive
