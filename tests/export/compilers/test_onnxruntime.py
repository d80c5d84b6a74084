"""Engines of ONNX Runtime: quantised weights."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import export
import export.checkpoint
from engines.bundle import MANIFEST, Bundle
from engines.errors import BundleError
from export.graphs.quantize import INT8
from tests.support.builds import content, logits
from tests.support.cases import refused


@pytest.mark.parametrize(("weights", "cosine"), [("int8", 0.999), ("int4", 0.9)])
def test_quantised_weights(tiny_checkpoint: Path, tmp_path: Path, weights: str, cosine: float) -> None:
    """Smaller files, logits nearly as they were, a build that is taken up, and no other build in their place."""
    whole = Bundle.open(export.build(tiny_checkpoint, tmp_path / "whole"))
    bundle = Bundle.open(export.build(tiny_checkpoint, tmp_path / "b", weights=weights))
    entry = bundle.engines("onnxruntime")
    data = entry["parts"]["layer_01"]["weights"]
    before = whole.manifest.files[whole.engines("onnxruntime")["parts"]["layer_01"]["weights"]]["size"]
    assert entry["weights"] == weights and data.endswith(f"layer_01.{weights}.data")
    assert bundle.manifest.files[data]["size"] < before / (2 if weights == "int8" else 3)
    nodes = onnx.load(str(bundle.graph("layer_01", "onnxruntime")), load_external_data=False).graph.node
    levels = [
        a.i for node in nodes if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "accuracy_level"
    ]
    assert levels == [INT8] * 7, "else the processor multiplies in fp32, and takes longer than with whole weights"
    got, expected = logits(bundle.root), logits(whole.root)
    near = float((got * expected).sum() / np.linalg.norm(got) / np.linalg.norm(expected))
    print(f"{weights}: max {np.abs(got - expected).max():.2e} cosine {near:.6f}")
    assert cosine < near < 1
    assert not list(bundle.root.rglob("*.whole.*")), "what the quantizer read is gone"
    (bundle.root / MANIFEST).unlink()
    assert content(export.build(tiny_checkpoint, bundle.root, weights=weights)) == content(bundle.root)
    with refused(BundleError, f"with other options (onnxruntime weights {weights})", "--force"):
        export.build(tiny_checkpoint, bundle.root)
