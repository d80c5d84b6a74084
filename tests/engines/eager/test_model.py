"""The eager model: its plain forward pass is the reference of all others."""

from pathlib import Path

import numpy as np
import pytest
import torch

import runtime
from engines.eager.model import EagerModel
from engines.model import Model


def test_the_forward_pass_of_a_batch_and_of_runners(golden_bundle: Path) -> None:
    """All sequences at once, without a cache, against one runner after the other."""
    ids = np.random.default_rng(0).integers(0, 250, (3, 30))
    with runtime.load(golden_bundle, "eager", threads=1) as loaded:
        assert isinstance(loaded.model, EagerModel)
        ours, theirs = loaded.model.forward(ids), Model.forward(loaded.model, ids)
    print(f"max {np.abs(ours - theirs).max():.1e} mean {np.abs(ours - theirs).mean():.1e}")
    assert ours.shape == theirs.shape == (3, 30, 256) and np.abs(ours - theirs).max() < 1e-4


def test_threads_and_device(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    before = torch.get_num_threads()
    try:
        with runtime.load(golden_bundle, "eager", threads=2, device="cpu") as loaded:
            assert torch.get_num_threads() == 2 and "CPU, 2 threads, torch" in loaded.model.device
    finally:
        torch.set_num_threads(before)
