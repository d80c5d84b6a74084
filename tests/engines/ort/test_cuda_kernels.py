"""Every node of the exported graphs has a kernel of ONNX Runtime's CUDA provider, in the oldest release allowed.

`python -m scripts.cuda_provider` asks the provider itself, which tests cannot download.
"""

import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

import export
from engines.config import PRECISIONS
from engines.ort.gpu import OLDEST
from export.checkpoint.registry import known
from tests.support.cases import DATA, ROOT
from tests.support.cuda_kernels import RELEASES, has_kernel, number, on_the_host, without_kernel

CHECKPOINTS: dict[str, tuple[Path, dict[str, Any]]] = {  # one of each family, and what its build must be told
    "llada": (DATA / "llada-tiny-a", {}),
    "dream": (DATA / "dream-tiny", {}),
    "illada": (DATA / "illada-tiny", {}),
    "sdar": (DATA / "sdar-tiny-a", {}),
    "llada-moe": (DATA / "llada-moe-tiny-a", {"mask_id": 255}),
    "llada2-moe": (DATA / "llada2-moe-tiny", {"mask_id": 253, "eos_id": 244}),
    "llada-v": (DATA / "llada-v/llada-v-tiny", {}),
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    """The exported graphs of a family in every precision."""
    folder, given = CHECKPOINTS[request.param]
    found = {}
    for precision in PRECISIONS:
        out = tmp_path_factory.mktemp("kernels") / "bundle"
        root = export.build(folder, out, precision=precision, backends=[], window=8, **given)
        for path in (root / "onnx").glob("*.onnx"):
            found[f"{precision} {path.stem}"] = onnx.load(str(path), load_external_data=False)
    return found


def test_every_family_is_looked_at() -> None:
    assert set(CHECKPOINTS) == {family.name for family in known()}


def test_every_node_has_a_kernel(graphs: dict[str, onnx.ModelProto]) -> None:
    """In the table, or since a release that is allowed."""
    oldest = ".".join(map(str, (*OLDEST, 0)))
    missing = {name: without_kernel(model, oldest) for name, model in graphs.items()}
    assert len(graphs) >= 3 * 7 and not {name: found for name, found in missing.items() if found}


def test_no_node_computes_with_shapes(graphs: dict[str, onnx.ModelProto]) -> None:
    """The provider would leave it to the CPU, and the session be refused."""
    assert not {name: found for name, model in graphs.items() if (found := on_the_host(model))}


def test_the_oldest_release_is_no_newer_than_needed() -> None:
    """Each mend that is listed is one that the table lacks; the last of them makes the oldest release."""
    assert max(map(number, RELEASES.values()))[:2] == OLDEST
    assert not [operator for operator in RELEASES if has_kernel(operator, {})]
    (wanted,) = re.findall(r'"onnxruntime-gpu>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert number(wanted) == OLDEST


def test_what_the_check_refuses() -> None:
    """A version beyond a kernel without an end, a type that it does not take, and arithmetic on a shape."""
    assert has_kernel("Cast 23", {"T1": "float", "T2": "float16"}) and not has_kernel("Cast 24", {})
    assert has_kernel("Cast 14", {}) and not has_kernel("ArgMax 13", {"T": "bfloat16"})
    assert not has_kernel("NoSuchOperator 1", {})
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Concat", ["shape", "shape"], ["twice"], name="twice", axis=0),
        helper.make_node("ArgMax", ["x"], ["y"], name="y"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["A"])
    outputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["B"]) for name in ("twice", "y")]
    graph = helper.make_graph(nodes, "g", [x], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    assert on_the_host(model) == ["twice", "twice"]
    assert without_kernel(model) == {"Shape 24", "ArgMax 13"} and without_kernel(model, "1.25.0") == {"ArgMax 13"}
