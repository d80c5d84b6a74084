"""Bundles that decode several sequences side by side, on the fake GPU."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import export
import runtime
from tests.support.cases import DATA, GOLDEN
from tests.support.fake_gpu import fake_gpu, fake_provider
from tests.support.gpu_models import SHAPE

Load = Callable[[Path, str], runtime.Runtime]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint in fp32, compiled by the fake for 8 sequences. Read only."""
    with fake_gpu():
        return export.build(GOLDEN, tmp_path_factory.mktemp("batch") / "bundle", backends=["all"], **SHAPE)


@pytest.fixture(scope="session")
def dream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family whose rows predict the next position, with fewer key heads than heads. Read only."""
    with fake_gpu():
        return export.build(DATA / "dream-tiny", tmp_path_factory.mktemp("dream") / "bundle", backends=["all"], **SHAPE)


@pytest.fixture(scope="session")
def load() -> Iterator[Load]:
    """A function that loads a bundle on a back end of the fake GPU, once; all are closed at the end."""
    with ExitStack() as stack:
        found: dict[tuple[Path, str], runtime.Runtime] = {}

        def loaded(bundle: Path, backend: str) -> runtime.Runtime:
            if (bundle, backend) not in found:
                with fake_gpu() if backend == "tensorrt" else fake_provider():
                    found[bundle, backend] = stack.enter_context(runtime.load(bundle, backend))
            return found[bundle, backend]

        yield loaded


@pytest.fixture(scope="session")
def model(bundle: Path, load: Load) -> runtime.Runtime:
    return load(bundle, "tensorrt")


@pytest.fixture(scope="session", params=["tensorrt", "onnxruntime"])
def either(request: pytest.FixtureRequest, bundle: Path, load: Load) -> runtime.Runtime:
    return load(bundle, request.param)
