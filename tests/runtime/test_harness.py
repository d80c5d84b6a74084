"""lm-evaluation-harness runs a bundle offline, with the score of `runtime eval`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import export
import runtime
from runtime.evaluation.exact_match import evaluate, summary
from tests.support.cases import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed; pip install '.[eval]' brings it"
)


@pytest.mark.slow
def test_the_same_score(tmp_path: Path) -> None:
    bundle = export.build("demo", tmp_path / "bundle")
    command = [
        sys.executable, "-m", "runtime.harness", "--model", "elastic",
        "--model_args", f"bundle={bundle},backend=onnxruntime,threshold=0.5", "--include_path", "scripts/tasks",
        "--tasks", "elastic_programs", "--limit", "12", "--output_path", str(tmp_path / "results.json"),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.glob("results*.json")
    theirs = json.loads(file.read_text())["results"]["elastic_programs"]["exact_match,none"]
    with runtime.load(bundle, "onnxruntime", threads=1) as model:
        options = {"threshold": 0.5, "gen_length": 192}
        ours = summary(evaluate(model, "programs", 12, "elastic", options))
    print(f"exact match {theirs} there, {ours['exact_match']} here")
    assert theirs == ours["exact_match"]


@pytest.mark.slow
def test_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "runtime.harness", "--model", "elastic", "--model_args",
               f"bundle={tmp_path}", "--include_path", "scripts/tasks", "--tasks", "elastic_sums"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "error: " in done.stderr and "Traceback" not in done.stderr
