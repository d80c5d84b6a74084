"""Golden data of llada-tiny-a: reading it, decoding with its options, and where a run diverges from it.

Logits, hidden states and trajectories come from the published code, the runs of Elastic-Cache from an independent
implementation. Runs have the oracle's form, as in `comparison`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import runtime
from export.verify.difference import Difference
from runtime.decoding.generate import Output
from tests.support.oracle import Oracle, Run, Step

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "llada-tiny-a"
ELASTIC = ("window", "threshold", "tokens_per_step", "gamma", "track_num", "drift", "block_caching")
PUBLISHED = {  # function of the published code -> our policy
    "llada.generate": "full", "fast_dllm.generate": "full",
    "fast_dllm.generate_with_prefix_cache": "prefix", "fast_dllm.generate_with_dual_cache": "dual",
}  # fmt: skip


def golden_logits(model: runtime.Runtime) -> Iterator[Difference]:
    """Compare the plain forward with the published model's logits."""
    stored = load_file(GOLDEN / "logits.safetensors")
    for length in (24, 80):
        logits = model.logits(stored[f"input_ids_{length}"].numpy())
        yield Difference.of(f"logits_{length}", logits, stored[f"logits_{length}"].numpy())


def golden_hidden(model: runtime.Runtime) -> Iterator[Difference]:
    """Compare the hidden states entering each layer; the last is stored after the final norm."""
    stored = load_file(GOLDEN / "logits.safetensors")
    norm = Oracle.read(GOLDEN)
    for name, row in (("hidden_24_seq2", stored["input_ids_24"][2]), ("hidden_80", stored["input_ids_80"][0])):
        runner = model.model.new_runner(len(row))
        runner.embed(row.numpy())
        runner.run_layers(len(row), None)
        *states, last = (runner.hidden(index, len(row)) for index in range(model.bundle.config.layers + 1))
        states.append(norm.norm(torch.from_numpy(last).double(), "ln_f").numpy())
        for index, (state, expected) in enumerate(zip(states, stored[name].numpy(), strict=True)):
            yield Difference.of(f"{name} {index}", state, expected)


def trajectories() -> list[dict[str, Any]]:
    content = json.loads((DATA / "trajectories_llada-tiny-a.json").read_text())
    found: list[dict[str, Any]] = content["trajectories"]
    return found


def replay(model: runtime.Runtime, golden: dict[str, Any]) -> Output:
    """Decode with the options of one published trajectory; a threshold replaces its number of steps."""
    args = golden["args"]
    name = "steps" if args.get("threshold") is None else "threshold"
    return model.generate(
        np.array(golden["prompt_ids"]), PUBLISHED[golden["function"]], gen_length=args["gen_length"],
        block_length=args["block_length"], stop_at_eos=False, **{name: args[name]},
    )  # fmt: skip


def trajectory_difference(out: Output, golden: dict[str, Any]) -> str | None:
    """Where a run diverges from a published trajectory: forwards, rows run, commits or tokens.

    The published cached loops call the model once more on a block that is already
    full. Such a call commits nothing; the policies do not make it.
    """
    calls = [(s, rows) for s, rows in zip(golden["steps"], golden["forward_lengths"], strict=True) if s["positions"]]
    if len(calls) != out.steps:
        return f"{out.steps} forwards, expected {len(calls)} of {golden['nfe']} calls"
    for event, (step, rows) in zip(out.trace, calls, strict=True):
        came = dict(zip(event.committed, event.tokens, strict=True))
        wanted = dict(zip(step["positions"], step["tokens"], strict=True))
        if came != wanted:
            return f"step {event.step}: commits {came}, expected {wanted}"
        if event.active != rows:
            return f"step {event.step}: {event.active} rows, expected {rows}"
    return None if out.sequence == golden["output_ids"] else f"ids {out.sequence}, expected {golden['output_ids']}"


def confidence_gap(out: Output, golden: dict[str, Any]) -> float:
    """The largest difference of a committed token's confidence from a trajectory with the same commits."""
    steps = (step for step in golden["steps"] if step["positions"])
    worst = 0.0
    for event, step in zip(out.trace, steps, strict=True):
        came = dict(zip(event.committed, event.confidences, strict=True))
        wanted: dict[int, float] = dict(zip(step["positions"], step["confidences"], strict=True))
        worst = max(worst, *(abs(came[position] - value) for position, value in wanted.items()))
    return worst


def elastic_runs() -> list[tuple[dict[str, Any], list[int], Run]]:
    """The golden runs of Elastic-Cache: options, prompt and decisions."""
    found = []
    for golden in json.loads((DATA / "elastic-llada-tiny-a.json").read_text()):
        options = {name: golden[name] for name in (*ELASTIC, "eos_id", "gen_length")}
        run = Run(golden["output_ids"], golden["eos_at"], [Step(**step) for step in golden["steps"]], golden["margins"])
        found.append((options, golden["prompt_ids"], run))
    return found
