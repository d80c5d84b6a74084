"""A family's model against published data beside its checkpoint, and its decisions against the oracle's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

import runtime
from export.verify.difference import Difference
from runtime.decoding.controller import Controller
from runtime.decoding.generate import Output, stream
from runtime.decoding.policies import Block
from runtime.decoding.policies.base import StepPlan
from runtime.decoding.request import Request
from runtime.decoding.sampler import Floats, Sampler, Tokens, filtered
from tests.support.comparison import NOISE, compare
from tests.support.goldens import confidence_gap, trajectory_difference
from tests.support.oracle import Oracle

NAMES = {  # tensors with Llama's names by the oracle's
    "model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out", "model.layers": "blocks",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm", "self_attn.o_proj": "attn_out",
    "self_attn.": "", "mlp.gate.": "router.", "mlp.": "", "gate_proj": "ff_proj", "down_proj": "ff_out",
}  # fmt: skip


def llama_oracle(folder: Path, **config: Any) -> Oracle:
    """A checkpoint with Llama's keys and names as the oracle reads one; `config` has what the oracle must know more."""
    raw = json.loads((folder / "config.json").read_text())
    tensors = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        for name, tensor in load_file(shard).items():
            for old, new in NAMES.items():
                name = name.replace(old, new)
            tensors[name] = tensor
    keys = {
        "n_layers": raw["num_hidden_layers"], "n_heads": raw["num_attention_heads"], "d_model": raw["hidden_size"],
        "n_kv_heads": raw["num_key_value_heads"], "weight_tying": raw["tie_word_embeddings"],
    }  # fmt: skip
    return Oracle(raw | keys | config, tensors)


def published_gaps(model: runtime.Runtime, folder: Path) -> Iterator[Difference]:
    """Compare logits and hidden states with those of the published class, which lie beside the checkpoint in `folder`.

    The last hidden state lies behind the final norm, and so is left to the logits.
    """
    stored = load_file(folder / "logits.safetensors")
    for length in (24, 80):
        logits = model.logits(stored[f"input_ids_{length}"].numpy())
        yield Difference.of(f"logits_{length}", logits, stored[f"logits_{length}"].numpy())
    runner = model.model.new_runner(80)
    runner.embed(stored["input_ids_80"][0].numpy())
    runner.run_layers(80, None)
    for index, expected in enumerate(stored["hidden_80"][:-1].numpy()):
        yield Difference.of(f"hidden_80 {index}", runner.hidden(index, 80), expected)


def fixed_canvas_runs(model: runtime.Runtime, goldens: list[dict[str, Any]]) -> list[tuple[str, str, dict[str, float]]]:
    """Replay published runs of LLaDA's loop, or of the one with a threshold, with the policy `full`.

    Returns the runs that differ: their ids, where they do, and the margins of their
    decisions. Confidences of the others must agree.
    """
    worst, apart = 0.0, []
    for golden in goldens:
        args = golden["args"]
        name = "steps" if args.get("threshold") is None else "threshold"
        out = model.generate(
            golden["prompt_ids"], "full", gen_length=args["gen_length"], block_length=args["block_length"],
            stop_at_eos=False, **{name: args[name]},
        )  # fmt: skip
        if found := trajectory_difference(out, golden):
            apart.append((str(golden["id"]), found, dict(golden["margins"])))
        else:
            worst = max(worst, confidence_gap(out, golden))
    print(f"{model.backend}: {len(goldens)} trajectories, confidence max {worst:.2e}, {apart=}")
    assert worst < NOISE
    return apart


def elastic_as_the_oracle(model: runtime.Runtime, decoder: Oracle, eos_id: int, seed: int) -> None:
    """Twelve random runs of `elastic` must take the oracle's decisions; two may hang on float noise."""
    rng, runs = np.random.default_rng(seed), []
    for number in range(12):
        prompt = rng.integers(6, 230, rng.integers(1, 30)).tolist()  # without the mask of any family
        options: dict[str, Any] = {
            "gen_length": int(rng.integers(8, 33)), "window": int(rng.integers(1, 17)), "gamma": 0.9 + number / 130,
            "threshold": 0.8, "tokens_per_step": None, "drift": ("row", "head")[number % 2], "track_num": 2,
            "block_caching": number % 3 > 0, "refresh_scope": ("all", "near")[number // 2 % 2], "eos_id": eos_id,
        }  # fmt: skip
        runs.append(compare(str(number), [model], decoder, prompt, **options))
    apart = sum(run.ambiguous for run in runs)
    print(f"{model.backend}: {sum(r.steps for r in runs)} steps, {sum(r.refreshes for r in runs)} refreshes, {apart=}")
    assert not [(run.name, run.diverged) for run in runs if run.wrong]
    assert apart <= 2 and sum(run.refreshes for run in runs) > 3


def growing_runs(model: runtime.Runtime, goldens: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Replay published runs of iLLaDA's loop, whose answer grows block by block; returns those that differ."""
    apart = []
    for golden in goldens:
        args = golden["args"]
        thinking = {name: args[name] for name in args if name.startswith("end_think")}
        stops = args.get("stop_token_ids")
        out = model.generate(
            golden["prompt_ids"], "full", grow=True, gen_length=args["gen_length"], block_length=args["block_length"],
            steps=args["steps"] * args["gen_length"] // args["block_length"], eos_id=stops, stop_at_eos=bool(stops),
            **thinking,
        )  # fmt: skip
        if found := early_difference(out, golden, stops or []):
            apart.append((str(golden["id"]), found))
    return apart


def block_runs(model: runtime.Runtime, goldens: list[dict[str, Any]], **defaults: Any) -> list[tuple[str, str]]:
    """Replay published runs of block diffusion with the policy `block`; returns those that differ."""
    apart = []
    for golden in goldens:
        args = golden["args"]
        steps = args.get("denoising_steps") or min(args["steps"], args["gen_length"] // args.get("minimal_topk", 1))
        stops = args.get("stopping_criteria_idx") or ([args["eos_id"]] if "eos_id" in args else [])
        threshold = args.get("confidence_threshold", args.get("threshold"))
        kind = args.get("remasking_strategy")
        out = model.generate(
            golden["prompt_ids"], "block", gen_length=args["gen_length"], block_length=args["block_length"],
            steps=min(steps, args["block_length"]), threshold=None if threshold == 1.0 else threshold,
            sequential=kind == "sequential", eos_id=stops or None,
            stop_at_eos=bool(stops),
        )  # fmt: skip
        if found := early_difference(out, golden, stops):
            apart.append((str(golden["id"]), found))
    return apart


def early_difference(out: Output, golden: dict[str, Any], stops: list[int]) -> str | None:
    """Where a run diverges from a published one, up to the step at which nothing before its first end is masked.

    The published loops finish the block in which an answer ends.
    """
    calls = [step for step in golden["steps"] if step["positions"]]
    for event, step in zip(out.trace, calls, strict=False):
        came = dict(zip(event.committed, event.tokens, strict=True))
        wanted = dict(zip(step["positions"], step["tokens"], strict=True))
        if came != wanted:
            return f"step {event.step}: commits {came}, expected {wanted}"
        for position, value in zip(step["positions"], step["confidences"], strict=True):
            if abs(event.confidences[event.committed.index(position)] - value) > NOISE and value != 1.0:
                return f"step {event.step}: confidence of {position} differs"
    ended = len(out.trace) < len(calls)
    if ended != (out.ended == "eos" and len(out.trace) < len(calls)) or len(out.trace) > len(calls):
        return f"{out.steps} steps, expected {len(calls)}"
    wanted = golden["generated_ids"]
    first = next((at for at, token in enumerate(wanted) if token in stops), None)
    wanted = wanted[: out.tokens] if first is None else wanted[:first]
    return None if out.ids == wanted else f"ids {out.ids}, expected {wanted}"


class Replayed(Sampler):
    """Draws the tokens that a published run has drawn, and ranks them by its confidence.

    `unfiltered` takes the probability before top-k and top-p, as the published evaluation does.
    """

    def __init__(self, golden: dict[str, Any]):
        args = golden["args"]
        super().__init__((args["mask_id"],), temperature=args["temperature"], top_p=args["top_p"],
                         top_k=args["top_k"] or None)  # fmt: skip
        self.masked: Tokens = np.zeros(0, np.int64)  # of the block, by the controller
        self.unfiltered = golden["function"].startswith("sdar.eval")
        self.steps = iter([step for step in golden["steps"] if step["positions"]])

    def draw(self, logits: Floats) -> tuple[Tokens, Floats]:
        """The block's recorded tokens at its masks, which are those whose draw is committed now or later."""
        step = next(self.steps)
        tempered: Floats = logits.astype(np.float64) / self.temperature
        if not self.unfiltered:
            tempered = filtered(tempered, self.top_k, self.top_p)
        tokens = np.array(step["draws"])[self.masked]
        return tokens, self.rank(tokens, tempered)


class ReplayController(Controller):
    """Tells the sampler which positions of the block are masks."""

    def _predict(self, plan: StepPlan) -> tuple[Tokens, Floats]:
        assert isinstance(self.sampler, Replayed) and isinstance(self.policy, Block) and self.policy.block_length
        self.sampler.masked = plan.candidates % self.policy.block_length
        return self.sampler.draw(self.runner.logits(self._logits_rows(plan.candidates)))


def sampled_runs(model: runtime.Runtime, goldens: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Replay published runs with a temperature on their own draws; returns those that differ."""
    apart = []
    for golden in goldens:
        args, static = golden["args"], golden["args"].get("remasking_strategy") == "low_confidence_static"
        threshold = None if static else args.get("confidence_threshold", args.get("threshold"))
        policy = Block(block_length=args["block_length"], steps=args["denoising_steps"], threshold=threshold)
        request = Request(
            golden["prompt_ids"], gen_length=args["gen_length"], stop_at_eos=False, temperature=args["temperature"]
        )

        def controller(runner: Any, sequence: Any, policy: Any, _: Any, golden: Any = golden) -> Controller:
            return ReplayController(runner, sequence, policy, Replayed(golden))

        *_, out = stream(model.model, request, policy, None, controller)
        assert isinstance(out, Output)
        if found := early_difference(out, golden, []):
            apart.append((str(golden["id"]), found))
    return apart
