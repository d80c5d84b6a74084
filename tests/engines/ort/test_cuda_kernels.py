"""Every operator of the parts for GPUs has a kernel of ONNX Runtime's CUDA provider, and none computes on a shape.

Sessions on a GPU refuse operators that would run on the CPU. tests/data/cuda_kernels.json holds what the provider of a
version takes, by its own choice (`scripts.gpu.provider.kernels`): asked without a GPU, with the CUDA runtime stubbed,
as nothing runs. On an H100 the same version placed LLaDA's parts as it says.
"""

import json
from pathlib import Path

import onnx
import pytest

import export
from scripts.gpu.provider import used_kernels
from tests.support.cases import DATA

FOLDERS: dict[str, dict[str, int]] = {  # checkpoint -> what its files lack
    "llada-tiny-a": {}, "dream-tiny": {}, "illada-tiny": {}, "sdar-tiny-a": {}, "llada-moe-tiny-a": {"mask_id": 5},
    "llada2-moe-tiny": {"mask_id": 5, "eos_id": 3},
}  # fmt: skip
SHAPES_AT = {"Expand": (1,), "Reshape": (1,), "Slice": (1, 2, 3, 4)}  # inputs that the provider reads on the host


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("name", FOLDERS)
def test_every_part_runs_on_the_gpu(name: str, precision: str, tmp_path: Path) -> None:
    known = set(json.loads((DATA / "cuda_kernels.json").read_text())["kernels"])
    bundle = export.build(
        DATA / name, tmp_path / "bundle", precision=precision, backends=[], window=4, **FOLDERS[name]
    )  # fmt: skip
    for path in sorted((bundle / "onnx").glob("*.onnx")):
        unknown = [kernel for _, kernel in used_kernels(path) if kernel not in known]
        assert not unknown, f"{path.name} has operators that are not known to run on a GPU: {unknown}"
        assert not computed_on_shapes(path), f"{path.name} computes on shapes, which the provider does on the CPU"


def computed_on_shapes(path: Path) -> list[str]:
    """Nodes that take a shape in another place than a shape's."""
    graph = onnx.load(str(path), load_external_data=False).graph
    shapes = {node.output[0] for node in graph.node if node.op_type == "Shape"}
    return [
        node.name
        for node in graph.node
        for index, name in enumerate(node.input)
        if name in shapes and index not in SHAPES_AT.get(node.op_type, ())
    ]
