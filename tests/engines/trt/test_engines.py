"""TensorRT engines and their contexts, on the fake GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import runtime
from engines.errors import BackendError
from engines.gpu.executor import ANY, REUSE
from engines.trt.engines import ScratchMemory
from engines.trt.model import TensorRTModel
from tests.support.cases import refused
from tests.support.fake_gpu import FakeCuda, fake_gpu


@pytest.fixture
def loaded(bundle: Path) -> Iterator[TensorRTModel]:
    """A model that has run nothing yet."""
    with fake_gpu(), runtime.load(bundle, "tensorrt") as made:
        assert isinstance(made.model, TensorRTModel)
        yield made.model


def test_scratch_memory_is_shared_and_grows() -> None:
    """A larger engine gets a new piece; the old one stays, because captured graphs contain its address."""
    cuda = FakeCuda()
    scratch = ScratchMemory(cuda)
    small = scratch.reserve(100)
    assert scratch.reserve(50) == small == (cuda.owned[0], 100)
    large = scratch.reserve(200)
    assert large[0] != small[0] and large[1] == 200 and scratch.reserve(150) == large
    assert cuda.owned == [small[0], large[0]]


def test_engines_and_contexts_are_made_once(loaded: TensorRTModel) -> None:
    """A context for each profile and batch size."""
    slots = loaded.slots_for_length(24)
    engine = loaded.engine("head", slots)
    assert loaded.engine("head", slots) is engine
    keys = (REUSE, 1), (ANY, 1), (REUSE, 2)
    contexts = [engine.context(*key) for key in keys]
    assert len({id(context) for context in contexts}) == 3
    assert all(engine.context(*key) is context for key, context in zip(keys, contexts, strict=True))


def test_only_what_changed_is_bound_again(loaded: TensorRTModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = loaded.engine("embed", loaded.slots_for_length(24))
    context = engine.context(REUSE, 1)
    rows = loaded.capacity.rows
    bindings = {"ids": (4096, (1, rows)), "hidden": (8192, (1, rows, loaded.config.d_model))}
    seen: list[tuple[object, ...]] = []

    def accept(*arguments: object) -> bool:
        seen.append(arguments)
        return True

    for name in ("set_tensor_address", "set_input_shape"):
        monkeypatch.setattr(context.context, name, accept)
    context.bind(bindings)
    assert seen == [("ids", 4096), ("ids", (1, rows)), ("hidden", 8192)]
    seen.clear()
    context.bind(bindings)
    assert seen == []
    context.bind(bindings | {"hidden": (12288, bindings["hidden"][1])})
    assert seen == [("hidden", 12288)]


def test_a_refused_shape_names_input_and_part(loaded: TensorRTModel) -> None:
    engine = loaded.engine("embed", loaded.slots_for_length(24))
    with refused(BackendError, "refuses ids (1, 100000) of embed", "build the bundle again"):
        engine.run(REUSE, {"ids": (4096, (1, 100000))})
