"""The parts in eager PyTorch, the reference of every back end.

Functions of tensors with the inputs and outputs of `engines.signatures.gpu`.
Weights are a dictionary by a part's local names; matrices are stored as [in, out],
so a part computes x @ W. A layer is pre-norm: RMSNorm, rotary embeddings that
rotate the halves of a head, grouped-query attention without a causal mask, SwiGLU
(LLaDA, arXiv 2502.09992) or a mixture of such networks; biases and norms of Q and K are as the config has them.
"""

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.config import ExpertsConfig, ModelConfig

Weights: TypeAlias = dict[str, Tensor]


def embed(weights: Weights, ids: Tensor) -> Tensor:
    """The part embed: ids [B, A] -> hidden [B, A, d]."""
    return F.embedding(ids, weights["wte.weight"])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last axis: x / sqrt(mean(x²) + eps) in float32, cast back, times `weight`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotary_tables(length: int, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [length, size/2] in float32 of rotary embeddings (arXiv 2104.09864): position p, pair i have the
    angle p · theta^(-2i/size)."""
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the first R elements of each head, in float32. x [B, A, H, D]; cos, sin [B, A, R/2]."""
    half = cos.shape[-1]
    first, second, kept = torch.split(x.float(), [half, half, x.shape[-1] - 2 * half], -1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, kept), -1).to(x.dtype)


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x @ W + b with the weights `name`, and without b where there is none."""
    product = x @ weights[f"{name}.weight"]
    bias = weights.get(f"{name}.bias")
    return product if bias is None else product + bias


def layer(
    config: ModelConfig,
    weights: Weights,
    tables: tuple[Tensor, Tensor],
    hidden: Tensor,
    positions: Tensor,
    key_mask: Tensor,
    write_index: int,
    k_cache: Tensor,
    v_cache: Tensor,
    key_positions: Tensor | None = None,
    block_ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One transformer layer on A rows: hidden [B, A, d] -> hidden_out [B, A, d] and q [B, A, H, D].

    The rows' keys and values overwrite slots write_index … write_index + A - 1 of
    `k_cache` and `v_cache` [B, G, S, D]; attention is over all slots where
    `key_mask` [B, S] is true and, where attention is block-causal, whose
    `key_positions` [B, S] lie before the row's `block_ends` [B, A]. `positions` [B, A]
    are used by the rotary only.
    """
    batch, rows, _ = hidden.shape
    normed = rms_norm(hidden, weights["attn_norm.weight"], config.norm_eps)
    q, k, v = (linear(weights, f"{name}_proj", normed).view(batch, rows, -1, config.head_size) for name in "qkv")
    if config.qk_norm:
        q, k = (rms_norm(x, weights[f"{n}_norm.weight"], config.norm_eps) for n, x in (("q", q), ("k", k)))
    cos, sin = (table[positions] for table in tables)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k_cache[:, :, write_index : write_index + rows] = k.transpose(1, 2)
    v_cache[:, :, write_index : write_index + rows] = v.transpose(1, 2)
    mask = None if bool(key_mask.all()) else key_mask[:, None, None, :].expand(-1, 1, rows, -1)
    if key_positions is not None and block_ends is not None:
        seen = key_positions[:, None, :] < block_ends[:, :, None]
        mask = seen[:, None] if mask is None else mask & seen[:, None]
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), k_cache, v_cache, attn_mask=mask, enable_gqa=config.kv_heads != config.heads
    )
    hidden = hidden + linear(weights, "attn_out", attended.transpose(1, 2).reshape(batch, rows, -1))
    normed = rms_norm(hidden, weights["ff_norm.weight"], config.norm_eps)
    if config.experts is not None and "router.weight" in weights:
        return hidden + experts(config.experts, weights, normed), q
    gated = F.silu(linear(weights, "ff_proj", normed)) * linear(weights, "up_proj", normed)
    return hidden + linear(weights, "ff_out", gated), q


def route(config: ExpertsConfig, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """The experts of each row of x [..., d]: their scores in the type of x, and their indices, both [..., k].

    Scores are in float32. A softmax is not scaled to a sum of 1 (the published
    LLaDAMoEModelLM); a sigmoid is computed from a product in float32 (LLaDA2MoeModelLM).
    """
    if not config.sigmoid:
        odds, chosen = linear(weights, "router", x).float().softmax(-1).topk(config.per_row, -1)
        return odds.to(x.dtype), chosen
    scores = (x.float() @ weights["router.weight"].float()).sigmoid()
    ranks = scores + weights["router.bias"].float()
    grouped = ranks.view(*ranks.shape[:-1], config.groups, -1)
    kept = grouped.topk(2, -1).values.sum(-1).topk(config.kept_groups, -1).indices
    open_ = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, kept, True)
    chosen = grouped.masked_fill(~open_.unsqueeze(-1), -torch.inf).flatten(-2).topk(config.per_row, -1).indices
    odds = scores.gather(-1, chosen)
    return (odds / (odds.sum(-1, keepdim=True) + 1e-20) * config.scale).to(x.dtype), chosen


def experts(config: ExpertsConfig, weights: Weights, x: Tensor) -> Tensor:
    """The mixture of experts on x [..., d]: the sum of each row's experts times their scores, by their index.

    The networks' matrices are stacked: `experts.ff_proj.weight` (the gate) and
    `experts.up_proj.weight` [E, d, I], `experts.ff_out.weight` [E, I, d].
    """
    odds, chosen = route(config, weights, x)
    result = torch.zeros_like(x)
    for index in sorted(set(chosen.flatten().tolist())):
        gate, up, out = (weights[f"experts.{name}.weight"][index] for name in ("ff_proj", "up_proj", "ff_out"))
        *rows, place = (chosen == index).nonzero(as_tuple=True)
        taken = x[tuple(rows)]
        network = (F.silu(taken @ gate) * (taken @ up)) @ out
        result[tuple(rows)] += network * odds[(*rows, place)].unsqueeze(-1)
    if config.shared:
        gate, up, out = (weights[f"shared.{name}.weight"] for name in ("ff_proj", "up_proj", "ff_out"))
        result = result + (F.silu(x @ gate) * (x @ up)) @ out
    return result


def head(config: ModelConfig, weights: Weights, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The part head: hidden [B, W, d] -> token [B, W], confidence [B, W], logits [B, W, V], the last two in float32.

    The confidence is the token's softmax probability over all columns but the
    suppressed ones; [MASK] counts there, but is never the token.
    """
    logits = linear(weights, "ff_out", rms_norm(hidden, weights["ln_f.weight"], config.norm_eps)).float()
    allowed = logits.clone()
    allowed[..., list(config.suppressed)] = -torch.inf
    total = allowed.logsumexp(-1)
    allowed[..., config.mask_id] = -torch.inf
    best, token = allowed.max(-1)
    return token, (best - total).exp(), logits


def attention_rows(q: Tensor, k: Tensor, key_mask: Tensor) -> Tensor:
    """Attention rows in float32: q [B, A, H, D], k [B, G, S, D], key_mask [B, S] -> softmax [B, H, A, S]."""
    return scores(q, k).masked_fill(~key_mask[:, None, None, :], -torch.inf).softmax(-1)


def scores(q: Tensor, k: Tensor) -> Tensor:
    """Attention scores q · k / sqrt(D) in float32: q [B, A, H, D], k [B, G, S, D] -> [B, H, A, S]."""
    batch, rows, heads, size = q.shape
    grouped = q.float().transpose(1, 2).reshape(batch, k.shape[1], -1, size) * size**-0.5
    product: Tensor = grouped @ k.float().transpose(2, 3)
    return product.view(batch, heads, rows, -1)


def drift(
    kind: str, q_prev: Tensor, q_now: Tensor, tracked_rows: Tensor, k_prev: Tensor, k_cache: Tensor, key_mask: Tensor
) -> Tensor:
    """The drift test: sigma [B] in float32, how similar the tracked tokens' attention is before and after a pass.

    q_prev, q_now [B, T, H, D]; tracked_rows [B, T] is true for the rows that count;
    k_prev [B, G, A, D] are the first A slots' keys before the pass, k_cache
    [B, G, S, D] all keys after it, of which key_mask [B, S] is true for those that
    exist. `kind` "row": the cosine of each head's attention row over the keys
    (arXiv 2510.14973); "head": the cosine across heads for each key, with an
    epsilon of 1e-8 on each norm, as in the authors' published code.
    """
    old, new = attention_before_and_after(q_prev, q_now, k_prev, k_cache, key_mask)
    axis, eps = (1, 1e-8) if kind == "head" else (-1, 0.0)
    norms = old.norm(dim=axis).clamp_min(eps) * new.norm(dim=axis).clamp_min(eps)
    similarity = (old * new).sum(axis) / norms  # [B, H, T]; for head: [B, T, S]
    counted = tracked_rows[:, :, None] & key_mask[:, None, :] if kind == "head" else tracked_rows[:, None, :]
    weights = counted.expand_as(similarity).float()
    total: Tensor = (similarity * weights).sum((1, 2))
    return total / weights.sum((1, 2))


def attention_before_and_after(
    q_prev: Tensor, q_now: Tensor, k_prev: Tensor, k_cache: Tensor, key_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention rows [B, H, T, S] of the tracked tokens with the queries and keys before a pass, and with those after.

    Shapes as in `drift`. Keys after the first A slots are the same before and after.
    """
    before = scores(q_prev, k_cache)
    before[..., : k_prev.shape[2]] = scores(q_prev, k_prev)
    old = before.masked_fill(~key_mask[:, None, None, :], -torch.inf).softmax(-1)
    return old, attention_rows(q_now, k_cache, key_mask)


def probe(
    track_num: int, q_window: Tensor, window_rows: Tensor, k_cache: Tensor, key_mask: Tensor, probe_keys: Tensor
) -> Tensor:
    """The probe: slots [B, track_num] of the keys with most attention of the window, summed over heads and rows.

    q_window [B, W, H, D]; window_rows [B, W] is true for the rows that count;
    probe_keys [B, S] is true for the keys that may be tracked. Most attended first.
    """
    rows = attention_rows(q_window, k_cache, key_mask) * window_rows[:, None, :, None]
    mass = rows.sum((1, 2)).masked_fill(~probe_keys, -1.0)
    return mass.topk(track_num, dim=-1).indices
