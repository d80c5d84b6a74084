"""Train the checkpoints `sudoku` and `vote`: small LLaDAs that fill the holes of `runtime.evaluation.puzzles` in place.

    python scripts/experiments/train_puzzles.py sudoku --work DIR --batches 3000
    python scripts/experiments/train_puzzles.py vote --work DIR --batches 6000

Writes a Hugging Face LLaDA directory (`export/sudoku`, `export/vote`). On one core a batch takes a third to half a
second. Resumable and seeded as `train_demo`, whose model and objective it has; a batch depends on the seed and its
index alone. Three of four Sudoku samples mask a random fraction of the holes, the others all holes behind a random one,
as a window leaves them; half of the votes do. Puzzles of the test split are never drawn.
"""

import argparse
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from runtime.evaluation import puzzles
from scripts.experiments.train_demo import SPECIAL, Model, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"sudoku": (48, 0.25), "vote": (32, 0.5)}  # puzzles of a batch, and the fraction that is masked in order
SHORT, SHORT_LINES = 0.25, 3  # of vote's batches the first quarter has three lines
TESTS = 128


def make_tokenizer(family: str) -> Tokenizer:
    """A word, or a digit, is a token; a text begins with the first special one."""
    vocabulary = {word: index for index, word in enumerate([*puzzles.vocabulary(family), *SPECIAL])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    start = SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, vocabulary[start])]
    )
    return tokenizer


def encoded(tokenizer: Tokenizer, drawn: list[puzzles.Puzzle]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, T] of puzzles of one length, and which of them are holes."""
    ids = np.array([tokenizer.encode(puzzle.solved).ids for puzzle in drawn])
    holes = np.zeros(ids.shape, bool)
    for row, puzzle in enumerate(drawn):
        holes[row, 1 + np.array(puzzle.holes)] = True
    return ids, holes


def batch(family: str, tokenizer: Tokenizer, seed: int, index: int, of: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, T] and what is masked of them."""
    rng, noise = random.Random(f"{seed}/{index}"), np.random.default_rng([seed, index])
    count, ordered = SIZES[family]
    short = family == "vote" and index < SHORT * of
    drawn = [puzzles.generate(family, rng, "train") for _ in range(count * (3 if short else 1))]
    if short:
        end = puzzles.GIVEN + SHORT_LINES * (puzzles.VOTERS + 2)
        drawn = [
            puzzles.Puzzle(p.family, p.words[:end], tuple(hole for hole in p.holes if hole < end)) for p in drawn
        ]  # fmt: skip
    ids, holes = encoded(tokenizer, drawn)
    masked = holes & (noise.random(holes.shape) < noise.random((len(ids), 1)))
    number = holes.cumsum(1)
    first = (noise.random((len(ids), 1)) * number[:, -1:]).astype(int)
    masked = np.where(noise.random((len(ids), 1)) < ordered, holes & (number > first), masked)
    empty = ~masked.any(1)
    masked[empty] = holes[empty]
    return ids, masked


@torch.no_grad()
def solved(model: Model, tokenizer: Tokenizer, family: str, count: int = TESTS) -> float:
    """The fraction of held-out puzzles that are right, one hole a step, without a cache."""
    rng, mask = random.Random(999), tokenizer.token_to_id("<|mdm_mask|>")
    ids, holes = encoded(tokenizer, [puzzles.generate(family, rng, "test") for _ in range(count)])
    found = torch.from_numpy(np.where(holes, mask, ids))
    while (masked := found == mask).any():
        logits = model.logits(model(found)).float().softmax(-1)
        logits[..., mask] = 0
        confidence, choice = logits.max(-1)
        best = confidence.masked_fill(~masked, -1).argmax(1)
        rows = torch.arange(count)[masked.any(1)]
        found[rows, best[rows]] = choice[rows, best[rows]]
    return float((found.numpy() == ids).all(1).mean())


def rate(index: int, of: int) -> float:
    """Warm-up, plateau, and a linear descent over the last quarter."""
    return min(1.0, (index + 1) / 60) * min(1.0, max(0.02, 4 * (of - index) / of))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", choices=SIZES)
    parser.add_argument("--work", type=Path, required=True, help="folder of the resumable state")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint (default: in export/)")
    parser.add_argument("--batches", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--save-every", type=float, default=120, help="seconds between saved states")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.family)
    model = Model(rows=-(-tokenizer.get_vocab_size() // 16) * 16)
    matrices = [p for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if "blocks" not in name or p.ndim != 2]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    index, state, mask = 0, args.work / f"{args.family}.pt", tokenizer.token_to_id("<|mdm_mask|>")
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        index = saved["index"]

    def save() -> None:
        content = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "index": index}
        torch.save(content, state.with_suffix(".tmp"))
        os.replace(state.with_suffix(".tmp"), state)
        card = {"batches": index, "seed": args.seed, "held_out_exact_match": solved(model, tokenizer, args.family)}
        print(card, flush=True)
        save_checkpoint(model, tokenizer, args.out or ROOT / "export" / args.family, card)

    tick, losses = time.time(), []
    while index < args.batches:
        ids, masked = batch(args.family, tokenizer, args.seed, index, args.batches)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(index, args.batches)
        where = torch.from_numpy(masked)
        logits = model.logits(model(torch.from_numpy(np.where(masked, mask, ids)))[where])
        loss = F.cross_entropy(logits, torch.from_numpy(ids)[where])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        index += 1
        losses.append(loss.item())
        if index % 25 == 0:
            print(f"{index} loss {np.mean(losses[-25:]):.4f} {time.time() - tick:.0f} s", flush=True)
        if time.time() - tick > args.save_every:
            save()
            tick = time.time()
    save()


if __name__ == "__main__":
    main()
