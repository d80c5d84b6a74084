"""A literal oracle of Elastic-Cache: slow, batch 1, and indexed by position only.

The engines keep active rows in permuted, padded slots. Here every row stays at its own position, so that the code can
be compared line by line with the description of the algorithm. It builds a LLaDA model from a Hugging Face style
checkpoint, decodes with it, and records every decision and its margin.

It imports none of the project's packages, so that it shares no mistake with them, and handles no tokenizer, batch or
padding.

Axes: S positions, A active rows, T tracked rows, L layers, d width, H heads, G key/value heads, D head size, V rows of
the embedding, which are the columns of the logits.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

# Any other value would change the results, so it is refused, not ignored.
REQUIRED: dict[str, Any] = {
    "block_type": "llama", "layer_norm_type": "rms", "layer_norm_with_affine": True, "bias_for_layer_norm": False,
    "activation_type": "silu", "rope": True, "alibi": False, "attention_layer_norm": False, "input_emb_norm": False,
    "scale_logits": False, "multi_query_attention": False,
}  # fmt: skip


@dataclass
class Step:
    active: int  # rows run up to the trigger (all N of them at step 0)
    sigma: list[float]  # of layer 0, 1, ... up to the trigger; empty at step 0
    trigger: int | None  # the layer whose test fired; the layers after it were refreshed
    committed: list[int]  # positions, ascending
    tracked: list[int]  # union over layers after the step, ascending
    length: int = field(default=0, compare=False)  # positions that exist
    unrolled: int = field(default=0, compare=False)  # of these, added before this step


@dataclass
class Run:
    output_ids: list[int]  # prompt + generated; positions never filled stay [MASK]
    eos_at: int | None = None
    steps: list[Step] = field(default_factory=list)
    margins: dict[str, float] = field(default_factory=dict)  # the smallest of each kind of decision

    @property
    def nfe(self) -> int:
        return len(self.steps)

    @property
    def margin(self) -> float:
        """The smallest margin of any decision of the run."""
        return min(self.margins.values(), default=math.inf)

    def note(self, kind: str, distances: Tensor) -> None:
        self.margins[kind] = min([self.margins.get(kind, math.inf), *distances.abs().flatten().tolist()])


class Oracle:
    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float64):
        for key, value in REQUIRED.items():
            if (config.get(key, value) or False) != value:
                raise ValueError(f"{key}={config[key]!r}: the oracle implements only {value!r}")
        self.config, self.dtype = config, dtype
        self.tensors = {name.removeprefix("model.transformer."): t.to(dtype) for name, t in tensors.items()}
        self.layers, self.heads, self.width = config["n_layers"], config["n_heads"], config["d_model"]
        self.kv_heads = config.get("n_kv_heads") or self.heads
        self.shift = config.get("shift", 0)  # the row of position p predicts position p + shift
        if len(self.tensors["wte.weight"]) != (config.get("embedding_size") or config["vocab_size"]):
            raise ValueError(f"embedding_size does not agree with the {len(self.tensors['wte.weight'])} rows of wte")

    @classmethod
    def read(cls, directory: str | Path, dtype: torch.dtype = torch.float64) -> "Oracle":
        """Read config.json and either model.safetensors or the shards that its index names."""
        folder, shards = Path(directory), {"model.safetensors"}
        if (index := folder / "model.safetensors.index.json").exists():
            shards = set(json.loads(index.read_text())["weight_map"].values())
        tensors = {name: t for shard in sorted(shards) for name, t in load_file(folder / shard).items()}
        return cls(json.loads((folder / "config.json").read_text()), tensors, dtype)

    # The model. Its functions take rows and their positions, never "the whole sequence".

    def linear(self, x: Tensor, name: str, biased: bool) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"] if biased else None)

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.tensors[f"{name}.weight"]

    def rotate(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """Rotary embedding of x [A, H, D]: element i is rotated with element i + D/2."""
        half = x.shape[-1] // 2
        frequency = self.config["rope_theta"] ** -(torch.arange(half, dtype=self.dtype) / half)
        angle = torch.tensor(positions, dtype=self.dtype)[:, None, None] * frequency  # [A, 1, D/2]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def qkv(self, layer: int, x: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """x [A, d] -> q [A, H, D], k [A, G, D], v [A, G, D], rotary already applied to q and k."""
        block, x = f"blocks.{layer}", self.norm(x, f"blocks.{layer}.attn_norm")
        biased = bool(self.config.get("include_bias") or self.config.get("include_qkv_bias"))
        q = self.linear(x, f"{block}.q_proj", biased).view(len(x), self.heads, -1)
        k, v = (self.linear(x, f"{block}.{n}_proj", biased).view(len(x), self.kv_heads, -1) for n in "kv")
        if self.config.get("qk_layernorm"):
            q, k = self.norm(q, f"{block}.q_norm"), self.norm(k, f"{block}.k_norm")
        return self.rotate(q, positions), self.rotate(k, positions), v

    def attention(self, q: Tensor, k: Tensor) -> Tensor:
        """q [A, H, D] on k [S, G, D] -> weights [H, A, S]. Nothing is masked out: the model is bidirectional."""
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)  # neighbouring heads share a key head
        scores = torch.einsum("ahe,nhe->han", q, k) / math.sqrt(q.shape[-1])
        return scores.to(torch.promote_types(self.dtype, torch.float32)).softmax(-1)

    def finish(self, layer: int, x: Tensor, weights: Tensor, v: Tensor) -> Tensor:
        """The rest of the layer: x [A, d], weights [H, A, S], v [S, G, D] -> the next layer's input [A, d]."""
        block, biased = f"blocks.{layer}", bool(self.config.get("include_bias"))
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        mixed = torch.einsum("han,nhe->ahe", weights.to(self.dtype), v).flatten(1)
        x = x + self.linear(mixed, f"{block}.attn_out", biased)
        y = self.norm(x, f"{block}.ff_norm")
        if f"{block}.router.weight" in self.tensors:
            return x + self.mixture(y, block)
        gate, up = (self.linear(y, f"{block}.{n}_proj", biased) for n in ("ff", "up"))
        return x + self.linear(F.silu(gate) * up, f"{block}.ff_out", biased)

    def mixture(self, x: Tensor, block: str) -> Tensor:
        """The sum of each row's likeliest experts, times their probabilities."""
        result = torch.zeros_like(x)
        odds = self.linear(x, f"{block}.router", False).softmax(-1)
        for row in range(len(x)):
            for expert in odds[row].topk(self.config["num_experts_per_tok"]).indices.tolist():
                gate, up = (self.linear(x[row], f"{block}.experts.{expert}.{n}_proj", False) for n in ("ff", "up"))
                network = self.linear(F.silu(gate) * up, f"{block}.experts.{expert}.ff_out", False)
                result[row] += odds[row, expert] * network
        return result

    def head(self, x: Tensor) -> Tensor:
        """x [A, d], before the final norm -> logits [A, V]."""
        tied, biased = self.config.get("weight_tying"), bool(self.config.get("include_bias"))
        x = self.norm(x, "ln_f")
        return self.linear(x, "wte", False) if tied else self.linear(x, "ff_out", biased)

    @torch.no_grad()
    def hidden(self, ids: Sequence[int]) -> Tensor:
        """[L + 1, S, d]: the input of each layer, then the output of the last one before the final norm."""
        states = [self.tensors["wte.weight"][list(ids)]]
        for layer in range(self.layers):
            q, k, v = self.qkv(layer, states[-1], range(len(ids)))
            states.append(self.finish(layer, states[-1], self.attention(q, k), v))
        return torch.stack(states)

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        return self.head(self.hidden(ids)[-1])  # [S, V]

    @torch.no_grad()
    def elastic(
        self, prompt_ids: Sequence[int], gen_length: int, window: int = 16, threshold: float | None = 0.9,
        tokens_per_step: int | None = None, gamma: float = 0.9, track_num: int = 1, drift: str = "row",
        block_caching: bool = True, refresh_scope: str = "all", eos_id: int | Sequence[int] | None = None,
        stop_at_eos: bool = True, mask_id: int | None = None, max_masks: int | None = None,
        window_span: int | None = None, refresh_start: str = "next", holes: Sequence[range] = (),
    ) -> Run:  # fmt: skip
        """Decode gen_length tokens after the prompt. eos_id (an id, or some) and mask_id default to the config's.

        With holes the prompt is a canvas: ids with masks there, and gen_length is 0. The first EOS in a hole fills its
        masks behind with itself, and those rows run again in the next step, as commits do.
        """
        if (threshold is None) == (tokens_per_step is None):
            raise ValueError("give either a threshold, or threshold=None and tokens_per_step")
        if drift not in ("row", "head") or refresh_scope not in ("all", "near") or min(window, track_num) < 1:
            raise ValueError(f"cannot do {drift=}, {refresh_scope=}, {window=}, {track_num=}")
        if refresh_start not in ("next", "first"):
            raise ValueError(f"cannot do {refresh_start=}")
        eos_id = self.config["eos_token_id"] if eos_id is None else eos_id
        ends = [eos_id] if isinstance(eos_id, int) else [*eos_id]
        mask_id = int(self.config["mask_token_id"] if mask_id is None else mask_id)
        ids, longest = [*prompt_ids], len(prompt_ids) + gen_length
        everywhere, head_width = list[int](), self.width // self.heads
        run, tracked, committed = Run(ids), list[int](), list[int]()

        # The cache. H[l] is the input of layer l: a layer writes its output into H[l + 1], and H[L] feeds the head.
        H = torch.zeros(self.layers + 1, longest, self.width, dtype=self.dtype)  # [L + 1, S, d]
        Q = torch.zeros(self.layers, longest, self.heads, head_width, dtype=self.dtype)  # [L, S, H, D]
        K = torch.zeros(self.layers, longest, self.kv_heads, head_width, dtype=self.dtype)  # [L, S, G, D]
        V = torch.zeros_like(K)

        def compute(layer: int, rows: list[int]) -> Tensor:
            """Compute rows of a layer; returns their attention weights [H, A, S]."""
            Q[layer, rows], K[layer, rows], V[layer, rows] = self.qkv(layer, H[layer, rows], rows)
            weights = self.attention(Q[layer, rows], K[layer, : len(ids)])
            H[layer + 1, rows] = self.finish(layer, H[layer, rows], weights, V[layer, : len(ids)])
            return weights

        while True:
            left, fresh = sum(ids[i] == mask_id for i in everywhere), list[int]()
            most = gen_length if max_masks is None else max_masks
            if run.eos_at is None and (not everywhere or left <= most // 2):
                ids += [mask_id] * min(most - left, longest - len(ids))
                fresh, everywhere = list(range(len(everywhere), len(ids))), list(range(len(ids)))
                if run.steps and fresh:  # masks were added: they are computed before any row attends to them
                    H[0, fresh] = self.tensors["wte.weight"][[ids[i] for i in fresh]]
                    for layer in range(self.layers):
                        compute(layer, fresh)
            masked = [i for i in everywhere if ids[i] == mask_id]
            fillable = [i for i in masked if run.eos_at is None or i <= run.eos_at]
            if not fillable:
                return run
            view = [i for i in fillable[:window] if window_span is None or i < fillable[0] + window_span]
            # "All remaining masks" are those still to be filled: masks after the EOS are no queries, only keys.
            logits_rows = [max(i - self.shift, 0) for i in view]  # the rows that predict the window
            active = sorted({*tracked, *committed, *(view if block_caching else fillable), *logits_rows})
            rows = active if run.steps else everywhere
            step, probed = Step(len(rows), [], None, [], [], len(ids), len(fresh)), set[int]()

            H[0, rows] = self.tensors["wte.weight"][[ids[i] for i in rows]]
            layer = -1
            while (layer := layer + 1) < self.layers:
                tested = bool(run.steps) and step.trigger is None
                before = self.attention(Q[layer, tracked], K[layer, : len(ids)]) if tested else None  # [H, T, S]
                weights = compute(layer, rows)
                mass = weights[:, [rows.index(i) for i in view]].sum((0, 1))  # [S], the window's attention
                probed.update(most_attended(mass, sorted({*everywhere} - {*masked}), track_num, run))
                if before is not None:
                    # Tracked rows are active: their queries, and all keys, are now those of this step.
                    sigma = similarity(before, self.attention(Q[layer, tracked], K[layer, : len(ids)]), drift)
                    step.sigma.append(float(sigma))
                    run.note("gamma", sigma - gamma)
                    if sigma < gamma:
                        # H[layer + 1] now holds fresh active rows among stale others. A refresh runs every row from the
                        # next layer on; "near" omits the masks that are not active in this step.
                        step.trigger = layer
                        omitted = {*masked} - {*active} if refresh_scope == "near" else set[int]()
                        rows = sorted({*everywhere} - omitted)
                        if refresh_start == "first":  # beyond the paper: all layers anew, and only they probe
                            layer, probed = -1, set()

            tokens = choose(self.head(H[-1, logits_rows]), threshold, tokens_per_step, mask_id, run)
            for row, token in tokens.items():
                ids[view[row]] = token
            step.committed = [view[row] for row in tokens]
            committed = [*step.committed, *close(ids, step.committed, holes, ends if stop_at_eos else [], mask_id)]
            tracked = step.tracked = sorted(probed)
            if stop_at_eos and run.eos_at is None and not holes:  # only the first step that commits an EOS sets the end
                run.eos_at = next((i for i in step.committed if ids[i] in ends), None)
            run.steps.append(step)


def close(ids: list[int], committed: list[int], holes: Sequence[range], ends: list[int], mask_id: int) -> list[int]:
    """Fill the masks of a hole behind an EOS that was committed in it; returns their positions."""
    filled = list[int]()
    for hole in holes:
        for end in [i for i in committed if i in hole and ids[i] in ends]:
            for i in range(end, hole.stop):
                if ids[i] == mask_id:
                    ids[i] = ids[end]
                    filled.append(i)
    return filled


def similarity(before: Tensor, now: Tensor, drift: str) -> Tensor:
    """Attention rows [H, T, S] of the tracked tokens: cosine over keys (the paper) or over heads (the published code),
    then the mean of what is left. The epsilon matters to "head" only: a key may get no attention from any head."""
    return F.cosine_similarity(before, now, dim=0 if drift == "head" else -1, eps=1e-8).mean()


def most_attended(mass: Tensor, eligible: Sequence[int], count: int, run: Run) -> list[int]:
    """The eligible positions of largest mass [S]; the lowest position wins a tie."""
    ranked = torch.tensor(eligible)[mass[eligible].argsort(descending=True, stable=True)].tolist()
    if len(ranked) > count:
        last, first_left_out = mass[ranked[count - 1]], mass[ranked[count]]
        run.note("probe", 1 - first_left_out / last)  # relative, because mass grows with the window
    return ranked[:count]


def choose(logits: Tensor, threshold: float | None, count: int | None, mask_id: int, run: Run) -> dict[int, int]:
    """Logits [A, V] of the window -> {row: token} of the rows to commit, ascending."""
    logits = logits.double()
    best = logits.index_fill(-1, torch.tensor(mask_id), -math.inf).topk(2)  # [A, 2], [MASK] is never committed ...
    confidence = logits.softmax(-1).gather(-1, best.indices[:, :1])[:, 0]  # [A], ... but keeps its share of softmax
    order = confidence.argsort(descending=True, stable=True)
    if threshold is None:
        rows = order[:count].sort().values
        run.note("threshold", confidence[order[len(rows) - 1]] - confidence[order[len(rows) :]])
    else:
        bar = min(threshold, float(confidence.max()))
        rows = (confidence >= bar).nonzero()[:, 0]
        run.note("threshold", confidence[order[1:]] - bar)  # the first is committed whatever the threshold
    run.note("argmax", best.values[rows, 0] - best.values[rows, 1])
    return {int(row): int(best.indices[row, 0]) for row in rows}
