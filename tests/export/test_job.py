"""A build under way: its files, its progress, and the weights of other targets from the same read."""

from pathlib import Path
from typing import Any

from engines.bundle import STAMPS
from engines.files import describe
from engines.signatures.cpu import cpu_signatures
from engines.signatures.gpu import gpu_signatures
from export.build import plan
from export.checkpoint.reader import Checkpoint
from export.job import BuildJob
from export.options import BuildOptions
from export.part import Target


def planned(checkpoint: Path, root: Path, seen: list[Any]) -> tuple[BuildJob, Target, Target]:
    """A job with nothing written, the exported parts in fp16 and those of the CPU in fp32."""
    job = plan(BuildOptions(checkpoint, root, "fp16", progress=lambda *event: seen.append(event)))
    (root / STAMPS).mkdir(parents=True)
    common: dict[str, Any] = {"precision": "fp16", "config": job.config}
    exported = Target(folder="onnx", dtype="fp16", signatures=gpu_signatures(job.config, "fp16", 1), **common)
    return job, exported, Target(folder="cpu", dtype="fp32", signatures=cpu_signatures(job.config, False), **common)


def test_weights_of_both_targets_come_first(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[Any] = []
    job, exported, other = planned(tiny_checkpoint, tmp_path / "b", seen)
    written = job.write_parts(exported, other)
    assert {"onnx/layer_01.safetensors", "cpu/layer_01.safetensors", "onnx/layer_01.onnx"} < set(job.files)
    assert not any(name.startswith("cpu/") and name.endswith(".onnx") for name in job.files)
    assert written["layer_01"] == {"graph": "onnx/layer_01.onnx", "weights": "onnx/layer_01.safetensors"}
    assert written["probe"] == {"graph": "onnx/probe.onnx", "weights": None}
    monkeypatch.setattr(Checkpoint, "part", None)  # the graphs are written without the checkpoint
    graphs = job.write_graphs(other)
    assert graphs["layer_01"] == {"graph": "cpu/layer_01.cpu.onnx", "weights": "cpu/layer_01.safetensors"}
    assert job.files == {name: describe(job.root / name) for name in job.files}
    counts = {folder: [number for what, number, _ in seen if what.startswith(folder)] for folder in ("onnx", "cpu")}
    assert counts == {"onnx": list(range(1, len(written) + 1)), "cpu": list(range(1, len(graphs) + 1))}
    assert [what for what, _, _ in seen][:2] == ["onnx/embed", "onnx/layer_00"]
