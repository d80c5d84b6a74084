"""`export verify`: parts and the plain forward pass of a back end against the reference."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.bundle import Bundle
from engines.errors import OptionError, ParityError
from engines.ort.model import OnnxRuntimeModel
from engines.ort.runner import OnnxRuntimeRunner
from export.verify import verify
from tests.support.cases import DRIFT_PARTS, refused

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def test_verify_accepts(golden_bundle: Path) -> None:
    rows = list(verify(Bundle.open(golden_bundle), "onnxruntime", 5e-4))
    assert [row.part for row in rows] == [
        "embed", "layer_00", "layer_01", "layer_02", "layer_03", "head", *DRIFT_PARTS, "probe", "forward",
    ]  # fmt: skip
    for row in rows:
        print(f"{row.part}: max {row.max:.2e} mean {row.mean:.2e} cosine {row.cosine:.8f}")
        assert 0 <= row.max < 5e-4 and row.cosine > 1 - 1e-6


@pytest.mark.parametrize(
    ("method", "part"), [("layer", "layer_02"), ("logits", "forward"), ("sigma", "drift_"), ("probes", "probe")]
)
def test_verify_finds_a_wrong_part(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch, method: str, part: str
) -> None:
    """One part at a time is made wrong; it is named, with what is made of it, and no other is blamed."""
    hook = method if method in ("layer", "logits") else "reuse"
    real = getattr(OnnxRuntimeRunner, hook)

    def wrong(runner: Any, index: Any, *rest: Any, **named: Any) -> Any:
        result = real(runner, index, *rest, **named)
        if method == "layer":
            runner.h[3, : rest[0]] += 1e-2 * (index == 2)
            return None
        if method == "logits":
            return result + 1e-2
        changed = {"sigma": [s + 1e-2 for s in result.sigma]} if method == "sigma" else {}
        return replace(result, **(changed or {"probes": [slots + 1 for slots in result.probes]}))

    monkeypatch.setattr(OnnxRuntimeRunner, hook, wrong)
    rows = []
    with refused(ParityError, part, "onnxruntime", "build it again", str(golden_bundle)):
        for row in verify(Bundle.open(golden_bundle), "onnxruntime", 5e-4):
            rows.append(row)
    assert len(rows) == 8 + len(DRIFT_PARTS), "the table is complete all the same"
    bad = {row.part for row in rows if not row.max <= 5e-4}
    assert bad == {"sigma": set(DRIFT_PARTS), "logits": {"head", "forward"}}.get(method, {part})


def test_verify_of_not_a_number(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OnnxRuntimeModel.forward
    monkeypatch.setattr(OnnxRuntimeModel, "forward", lambda self, *args: real(self, *args) * math.nan)
    with refused(ParityError, "forward", "nan", "build it again"):
        list(verify(Bundle.open(golden_bundle), "onnxruntime", 5e-4))


def test_verify_refuses(golden_bundle: Path) -> None:
    bundle = Bundle.open(golden_bundle)
    for atol in (0.0, -1.0, math.nan):
        with refused(OptionError, "atol must be positive", str(atol)):
            list(verify(bundle, "onnxruntime", atol))
    with refused(OptionError, "eager is the reference", "another"):
        list(verify(bundle, "eager", 1e-3))
