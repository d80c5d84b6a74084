"""Canvases decoded by the rules of the policies without a drift test, written down literally on the oracle's layers.

A block counts from the first mask, and is new while all of its first masks are masked. A fixed schedule spreads a
block's own masks over its steps. Each hole ends at the first EOS in it (`tests.support.oracle.close`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.support.oracle import Oracle, close

PROMPT_INTERVAL, RESPONSE_INTERVAL = 5, 2


@dataclass
class Blockwise:
    """A run: the ids, the commits of each step, and the smallest distance of a decision."""

    ids: list[int]
    steps: list[list[int]]
    margin: float


def blockwise(
    oracle: Oracle, canvas: Sequence[int], holes: Sequence[range], policy: str, block: int, threshold: float | None,
    ends: list[int], mask_id: int,
) -> Blockwise:  # fmt: skip
    """Decode with `full`, `prefix`, `dual` or `interval`."""
    ids, run = [*canvas], Blockwise([], [], 1.0)
    first, everywhere = holes[0].start, range(len(ids))
    initial = [i for hole in holes for i in hole]
    H = torch.zeros(oracle.layers + 1, len(ids), oracle.width, dtype=oracle.dtype)
    K = torch.zeros(oracle.layers, len(ids), oracle.kv_heads, oracle.width // oracle.heads, dtype=oracle.dtype)
    V = torch.zeros_like(K)
    while mask_id in ids:
        start = first + (ids.index(mask_id) - first) // block * block
        end = min(start + block, len(ids))
        own = [i for i in initial if start <= i < end]
        open_ = [i for i in own if ids[i] == mask_id]
        new, step = len(open_) == len(own), len(run.steps)
        rows = list(everywhere)
        if policy == "prefix" and not new:
            rows = list(range(start, len(ids)))
        elif policy == "dual" and not new:
            rows = list(range(start, end))
        elif policy == "interval" and step % PROMPT_INTERVAL:
            rows = list(range(start, end)) if step % RESPONSE_INTERVAL else list(range(first, len(ids)))
        H[0, rows] = oracle.tensors["wte.weight"][[ids[i] for i in rows]]
        for layer in range(oracle.layers):
            q, K[layer, rows], V[layer, rows] = oracle.qkv(layer, H[layer, rows], rows)
            H[layer + 1, rows] = oracle.finish(layer, H[layer, rows], oracle.attention(q, K[layer]), V[layer])
        logits = oracle.head(H[-1, open_]).double()
        best = logits.index_fill(-1, torch.tensor(mask_id), -torch.inf).topk(2)
        confidence = logits.softmax(-1).gather(-1, best.indices[:, :1])[:, 0]
        ranked = confidence.sort(descending=True, stable=True)
        if threshold is None:  # one commit a step: as many steps as a block has positions
            taken = sorted(ranked.indices[:1].tolist())
            gaps = ranked.values[:1] - ranked.values[1:2]
        else:
            bar = min(threshold, float(confidence.max()))
            taken = (confidence >= bar).nonzero()[:, 0].tolist()
            gaps = (ranked.values[1:] - bar).abs()
        run.margin = min([run.margin, *gaps.tolist(), *(best.values[taken, 0] - best.values[taken, 1]).tolist()])
        run.steps.append([open_[row] for row in taken])
        for row in taken:
            ids[open_[row]] = int(best.indices[row, 0])
        close(ids, run.steps[-1], holes, ends, mask_id)
    run.ids = ids
    return run
