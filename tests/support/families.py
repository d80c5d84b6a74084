"""A family's model against published data beside its checkpoint, and its decisions against the oracle's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

import runtime
from export.verify.difference import Difference
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
