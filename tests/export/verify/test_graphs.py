"""`export verify --backend graphs`: every output of the exported graphs against the reference."""

import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

import export
from engines.bundle import Bundle
from engines.errors import BackendError, OptionError, ParityError
from engines.files import describe
from export.cli import main
from export.verify import GRAPHS, tolerance, verify
from export.verify.difference import Difference
from tests.support.cases import DATA, GOLDEN, edit_manifest, refused


def compare(root: Path) -> dict[str, Difference]:
    bundle = Bundle.open(root)
    return {row.part: row for row in verify(bundle, GRAPHS, tolerance(bundle, GRAPHS))}


def changed(source: Path, target: Path, part: str, change: Any) -> Path:
    """A copy of the bundle whose exported graph of `part` is changed, with a manifest that says so."""
    shutil.copytree(source, target)
    graph = target / "onnx" / f"{part}.onnx"
    model = onnx.load(str(graph), load_external_data=False)
    change(model.graph)
    graph.write_bytes(model.SerializeToString())
    edit_manifest(target, lambda content: content["files"].update({f"onnx/{part}.onnx": describe(graph)}))
    return target


# Exported graphs


def test_every_output_of_every_graph(golden_bundle: Path) -> None:
    rows = compare(golden_bundle)
    layers = [f"layer_{i:02d} {name}" for i in range(4) for name in ("hidden_out", "q", "k_cache_out", "v_cache_out")]
    head = [f"head {name}" for name in ("confidence", "logits", "token")]
    tests = [f"tests_{kind} {name}" for kind in ("row", "head") for name in ("sigma", "probe")]
    assert list(rows) == ["embed hidden", *layers, *head, *tests, "probe probe"]
    for row in rows.values():
        print(f"{row.part}: max {row.max:.2e} mean {row.mean:.2e} cosine {row.cosine:.8f}")
        assert row.max < 5e-5 * row.scale and row.cosine > 1 - 1e-6


def test_half_precision_has_its_own_tolerance(tmp_path: Path) -> None:
    """A graph in fp16 rounds each intermediate value: more than engines in fp32 on the same weights may differ by."""
    rows = compare(export.build(GOLDEN, tmp_path / "b", precision="fp16", backends=[]))
    worst = max(rows.values(), key=lambda row: row.max / row.scale)
    print(f"{worst.part}: max {worst.max:.2e} of {worst.scale:.3g}")
    assert "head token" not in rows and 1e-4 < worst.max / worst.scale < 2e-3


@pytest.mark.slow
def test_vision_graphs(tmp_path: Path) -> None:
    rows = compare(export.build(DATA / "llada-v" / "llada-v-tiny", tmp_path / "b", backends=[]))
    assert {"tower features", "projector projected"} <= set(rows)


def test_a_wrong_attribute_is_found(golden_bundle: Path, tmp_path: Path) -> None:
    """One norm's epsilon: hidden states, queries, keys and values of that layer differ, and nothing else."""

    def change(graph: onnx.GraphProto) -> None:
        norm = next(node for node in graph.node if node.op_type == "RMSNormalization")
        next(a for a in norm.attribute if a.name == "epsilon").f = 1.0

    bundle = changed(golden_bundle, tmp_path / "b", "layer_02", change)
    rows: list[Difference] = []
    with refused(ParityError, "4 parts", "layer_02", "graphs", "build it again", str(bundle)):
        rows.extend(verify(Bundle.open(bundle), GRAPHS, 5e-4))
        pytest.fail("no difference")
    seen = list(found(bundle))
    assert {row.part.partition(" ")[0] for row in seen if not row.within(5e-4)} == {"layer_02"}


def found(bundle: Path) -> list[Difference]:
    """All rows, although some are beyond the tolerance."""
    rows: list[Difference] = []
    try:
        for row in verify(Bundle.open(bundle), GRAPHS, 5e-4):
            rows.append(row)
    except ParityError:
        pass
    return rows


def test_a_cache_that_is_not_written_is_found(golden_bundle: Path, tmp_path: Path) -> None:
    """Values that do not reach the cache's output, where attention is right: only this comparison sees it."""

    def change(graph: onnx.GraphProto) -> None:
        write = next(node for node in graph.node if node.output[0] == "v_cache_out")
        write.output[0] = "v_written"
        for node in graph.node:
            node.input[:] = ["v_written" if name == "v_cache_out" else name for name in node.input]
        graph.node.append(onnx.helper.make_node("Identity", ["v_cache"], ["v_cache_out"]))

    rows = found(changed(golden_bundle, tmp_path / "b", "layer_01", change))
    assert {row.part for row in rows if not row.within(5e-4)} == {"layer_01 v_cache_out"}


def test_an_unknown_output_token_is_found(golden_bundle: Path, tmp_path: Path) -> None:
    def change(graph: onnx.GraphProto) -> None:
        next(node for node in graph.node if node.op_type == "ArgMax").op_type = "ArgMin"

    rows = found(changed(golden_bundle, tmp_path / "b", "head", change))
    assert {row.part for row in rows if not row.within(5e-4)} == {"head token"}


def test_what_cannot_be_compared(golden_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = Bundle.open(export.build(GOLDEN, tmp_path / "b", precision="bf16", backends=[]))
    with refused(OptionError, "bf16", "on a CPU", "verify a back end"):
        list(verify(half, GRAPHS, 1e-3))
    bundle = Bundle.open(golden_bundle)
    for name in ("export.verify.graphs", "export.verify.runners"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    with refused(BackendError, "polygraphy.comparator", "not installed", "pip install 'elastic-diffusion[export,cpu]'"):
        list(verify(bundle, GRAPHS, 1e-3))


# The command line


def test_verify_graphs_from_the_command_line(golden_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(golden_bundle), "--backend", "graphs"]) == 0
    shown = capsys.readouterr()
    assert "layer_03 v_cache_out" in shown.out and "[ok] all values close" in shown.out
    assert all(line.startswith("verify: ") for line in shown.err.splitlines()), "progress alone"


def test_a_failure_from_the_command_line(golden_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(golden_bundle), "--backend", "graphs", "--atol", "1e-12"]) == 1
    assert "differ from eager by more than 1e-12 on graphs" in capsys.readouterr().err
