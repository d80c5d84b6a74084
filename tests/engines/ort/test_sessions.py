"""Sessions on the CPU: one pool of threads, errors that name the part."""

import os
from pathlib import Path

import numpy as np
import pytest

import runtime
from engines.errors import BackendError, OptionError
from engines.ort.model import OnnxRuntimeModel
from engines.ort.sessions import share_threads
from tests.support.cases import refused

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def test_one_pool_for_the_process(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with refused(OptionError, "pool already has 1 threads", "not 3"):
        runtime.load(golden_bundle, "onnxruntime", threads=3)
    assert share_threads(None) == share_threads(1) == 1


def test_a_failure_names_the_part(golden: runtime.Runtime) -> None:
    assert isinstance(golden.model, OnnxRuntimeModel)
    with refused(BackendError, "ONNX Runtime failed on embed", "python -m export verify"):
        golden.model.sessions.run("embed", ["hidden"], ids=np.array([[999]]))
