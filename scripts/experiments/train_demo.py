"""Train the demo checkpoint: a small LLaDA on the problems of `runtime.evaluation.tasks`.

    python scripts/experiments/train_demo.py --work DIR --tokens 40_000_000

Writes a Hugging Face LLaDA directory (`export/demo` by default). Resumable: the state in `--work` is saved every few
minutes; a new run continues from it, and with a larger `--tokens` a finished run continues too. Seeded: each batch
depends only on the seed and its index. The objective is LLaDA's (arXiv 2502.09992, Algorithm 2): mask a random fraction
of the answer and predict the masked tokens. Some samples are masked as in decoding (solved up to a line, half-filled
in a window, empty beyond), and some hide only results or operands, which teaches arithmetic and look-ups fastest.
"""

import argparse
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from runtime.evaluation import tasks

SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|mdm_mask|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SHAPE = dict(d_model=128, n_layers=8, n_heads=4, mlp_hidden_size=352, rope_theta=10000.0, rms_norm_eps=1e-5)
PEAK = 8.0  # attention scores are limited to ± this, so that gradients do not vanish and attention masses do not tie
CURRICULUM = 9e6  # tokens until problems have their full length
DRILL = 0.6, 0.3  # fraction of batches that drill arithmetic, during the curriculum and after it
BATCH_TOKENS = 4096


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE, as LLaDA's, with each digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?[A-Za-z]+| ?\d|\n+| ?[^\sA-Za-z\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    problems = [tasks.generate(f, rng, "train", rng.randint(1, 22)) for f in tasks.FAMILIES for _ in range(3000)]
    corpus = [f"user\n\n{p.prompt}\nassistant\n\n{p.solution}\n" for p in problems]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@dataclass(frozen=True)
class Step:
    """Columns of a worked step, in tokens: `results` and where they are seen again, `lookups` from elsewhere."""

    width: int
    results: tuple[int, ...]
    lookups: tuple[tuple[int, ...], ...]


STEP = {
    "sums": Step(10, (7, 8, 11, 12), ((1, 2, 3, 4, 5, 7, 8, 11, 12), (3, 4, 5, 7, 8, 11, 12))),
    "programs": Step(17, (14, 15), ((6, 7, 9, 10), (6, 7, 9, 10, 14, 15), (2, 3, 4, 6, 7, 8, 9, 10, 14, 15))),
}


class Block(nn.Module):
    """A transformer layer with the published parameter names; q, k and v run as one product."""

    def __init__(self, d: int, heads: int, mlp: int, eps: float):
        super().__init__()
        self.heads = heads
        self.attn_norm, self.ff_norm = nn.RMSNorm(d, eps), nn.RMSNorm(d, eps)
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            setattr(self, name, nn.Linear(d, d, bias=False))
        self.ff_proj, self.up_proj = nn.Linear(d, mlp, bias=False), nn.Linear(d, mlp, bias=False)
        self.ff_out = nn.Linear(mlp, d, bias=False)

    def forward(self, x, cos, sin):
        batch, length, d = x.shape
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        q, k, v = F.linear(self.attn_norm(x), weight).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = rotate(q, cos, sin) @ rotate(k, cos, sin).mT * q.shape[-1] ** -0.5
        if self.training:
            self.peaks = scores.detach()[:4].abs().amax((0, 2, 3)).float()
        attended = scores.softmax(-1).to(v.dtype) @ v  # on a CPU twice as fast as the fused attention's two passes
        x = x + self.attn_out(attended.transpose(1, 2).reshape(batch, length, d))
        weight = torch.cat((self.ff_proj.weight, self.up_proj.weight))
        gate, up = F.linear(self.ff_norm(x), weight).chunk(2, -1)
        return x + self.ff_out(F.silu(gate) * up)


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), -1) * sin.to(x.dtype)


class Model(nn.Module):
    """LLaDA under its published parameter names."""

    def __init__(self, rows: int):
        super().__init__()
        d, heads = SHAPE["d_model"], SHAPE["n_heads"]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, d),
                "blocks": nn.ModuleList(
                    Block(d, heads, SHAPE["mlp_hidden_size"], SHAPE["rms_norm_eps"]) for _ in range(SHAPE["n_layers"])
                ),
                "ln_f": nn.RMSNorm(d, SHAPE["rms_norm_eps"]),
                "ff_out": nn.Linear(d, rows, bias=False),
            }
        )
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 if "wte" in name else p.shape[1] ** -0.5 * (0.3 if "out" in name else 1))
        half = d // heads // 2
        self.frequencies = SHAPE["rope_theta"] ** (-torch.arange(half, dtype=torch.float32) / half)

    def relate(self, tokenizer: Tokenizer) -> None:
        """Let a letter start alike with and without a space before it: as a name and where it is used."""
        table = self.transformer["wte"].weight.data
        for letter in tasks.LETTERS + tasks.INPUTS:
            named, used = tokenizer.token_to_id(letter), tokenizer.token_to_id(f"Ġ{letter}")
            if used is not None:
                table[used] = table[named] + 0.3 * (table[used] - table[named])

    def forward(self, ids):
        angles = torch.outer(torch.arange(ids.shape[1], dtype=torch.float32), self.frequencies).repeat(1, 2)
        x = self.transformer["wte"](ids)
        for block in self.transformer["blocks"]:
            x = block(x, angles.cos(), angles.sin())
        return x

    @torch.no_grad()
    def soften(self) -> None:
        """Shrink the queries and keys of a head whose largest score passed PEAK (QK-clip, arXiv 2507.20534)."""
        for block in self.transformer["blocks"]:
            shrink = (PEAK / block.peaks).clamp(0.99, 1).sqrt()
            for projection in (block.q_proj, block.k_proj):
                projection.weight.view(block.heads, -1).mul_(shrink[:, None])

    def logits(self, hidden):
        return self.transformer["ff_out"](self.transformer["ln_f"](hidden))


class Data:
    """Batches: ids [B, T] with the answer's span; every sequence is filled up with EOS."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self.tokenizer, self.seed = tokenizer, seed
        self.mask, self.eos = tokenizer.token_to_id("<|mdm_mask|>"), tokenizer.token_to_id("<|endoftext|>")
        self.vocab = tokenizer.get_vocab_size()

    def chat(self, turns: list[tuple[str, str]]) -> str:
        said = "".join(f"<|start_header_id|>{r}<|end_header_id|>\n\n{t}<|eot_id|>" for r, t in turns)
        return f"<|startoftext|>{said}<|start_header_id|>assistant<|end_header_id|>\n\n"

    def draw(self, rng, split, steps, shots=0):
        """One (prompt text, problem) with `shots` solved problems of the same family before it."""
        family = rng.choice(tasks.FAMILIES)
        if family == "programs":
            steps = -(-steps * 2 // 3)  # their steps are longer
        turns = []
        for _ in range(shots):
            shot = tasks.generate(family, rng, "train", rng.randint(2, 7))
            turns += [("user", shot.prompt), ("assistant", shot.solution)]
        problem = tasks.generate(family, rng, split, steps)
        return self.chat([*turns, ("user", problem.prompt)]), problem

    def plan(self, rng, seen: float) -> tuple[int, int, int, int]:
        """(fewest steps, most steps, shots, filler) of a batch after `seen` tokens: the curriculum."""
        if seen < 2e6:
            return 1, 3, 0, rng.choice((0, 8))
        if seen < 5e6:
            return 1, rng.choice((4, 6)), 0, rng.choice((0, 16))
        if seen < CURRICULUM:
            return 2, rng.choice((6, 10)), 0, rng.choice((0, 16))
        kind = rng.random()
        if kind < 0.15:
            return 1, 5, 0, rng.choice((0, 64))
        if kind < 0.9:
            low = rng.choice((4, 6, 8, 10))
            return low, low + 3, 0, rng.choice((0, 0, 16, 64))
        if kind < 0.96:
            low = rng.choice((4, 8))
            return low, low + 4, rng.choice((1, 2, 3, 4)), rng.choice((0, 0, 300))
        low = rng.choice((2, 6, 10, 14, 18))
        return low, low + 4, 0, rng.choice((128, 256, 400))

    def batch(self, index: int, seen: float):
        rng = random.Random(f"{self.seed}/{index}")
        if rng.random() < DRILL[seen >= CURRICULUM]:
            return self.drill(rng)
        low, high, shots, filler = self.plan(rng, seen)
        rows, width = [], 0
        while not rows or (len(rows) + 1) * width <= BATCH_TOKENS:
            text, problem = self.draw(rng, "train", rng.randint(low, high), shots)
            prompt, answer = self.tokenizer.encode_batch_fast([text, problem.solution], add_special_tokens=False)
            rows.append((prompt.ids, answer.ids, STEP[problem.family]))
            width = max(width, len(prompt.ids) + len(answer.ids) + 1 + filler)
        ids = np.full((len(rows), width), self.eos, dtype=np.int64)
        hidden = np.zeros(ids.shape, bool)
        weight = np.zeros(ids.shape, np.float32)
        noise = np.random.default_rng([self.seed, index])
        for i, (prompt, answer, step) in enumerate(rows):
            start, end = len(prompt), len(prompt) + len(answer)
            ids[i, :end] = prompt + answer
            weight[i, start : end + 2], weight[i, end + 2 :] = 1, 0.05
            hidden[i, start:] = self.corrupt(noise, step, len(answer), width - start)
        weight *= hidden
        weight /= np.maximum(weight.sum(1, keepdims=True), 1) * len(rows)
        noisy = np.where(hidden, self.mask, ids)
        return map(torch.from_numpy, (noisy, ids, weight))

    def drill(self, rng):
        """Unrelated steps without a prompt, their results masked: practice in arithmetic alone."""
        family, lines = rng.choice(tasks.FAMILIES), 20
        step = STEP[family]
        count = BATCH_TOKENS // (lines * step.width)
        texts = [tasks.drill(family, rng, lines) for _ in range(count)]
        ids = np.array([e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)])
        hidden = np.zeros(ids.shape, bool)
        for column in step.results[:2]:
            hidden[:, column :: step.width] = True
        weight = hidden / hidden.sum(dtype=np.float32)
        return map(torch.from_numpy, (np.where(hidden, self.mask, ids), ids, weight.astype(np.float32)))

    def corrupt(self, noise, step: Step, answer: int, span: int):
        """Which of `span` positions are masked, at least one of them."""
        kind = noise.random()
        starts = np.arange((answer - 3) // step.width)[:, None] * step.width
        if kind < 0.15:
            hidden = noise.random(span) < noise.random()
        elif kind < 0.25:  # results with their operands in sight: practice in arithmetic
            hidden = noise.random(span) < 0.05
            hidden[(starts[noise.random(len(starts)) < 0.5] + step.results).ravel()] = True
        elif kind < 0.45:  # operands with the names they stand for in sight: practice in looking up
            hidden = noise.random(span) < 0.05
            columns = step.lookups[noise.integers(len(step.lookups))]
            hidden[(starts[noise.random(len(starts)) < noise.random() + 0.2] + columns).ravel()] = True
        else:  # as decoding meets it
            solved = noise.integers(0, answer + 1)
            window = noise.choice((8, 16, 24, 32, 48))
            hidden = np.arange(span) >= solved
            ahead = slice(solved, solved + window)
            hidden[ahead] = noise.random(len(hidden[ahead])) < noise.random() ** 0.5
            if noise.random() < 0.15:
                hidden[:solved] |= noise.random(solved) < 0.1
        hidden[noise.integers(0, answer + 1)] = True
        return hidden


@torch.no_grad()
def exact_match(model, data: Data, count: int, threshold=0.9, window=32) -> dict[str, float]:
    """Share of held-out problems solved, by threshold decoding without a cache."""
    rng, solved, total = random.Random(1), dict.fromkeys(tasks.FAMILIES, 0), dict.fromkeys(tasks.FAMILIES, 0)
    drawn = [data.draw(rng, "test", rng.randint(6, 12)) for _ in range(count)]
    encoded = [data.tokenizer.encode(text, add_special_tokens=False).ids for text, _ in drawn]
    longest = max(map(len, encoded)) + 192
    ids = torch.full((count, longest), data.eos)
    for i, prompt in enumerate(encoded):
        ids[i, : len(prompt)] = torch.tensor(prompt)
        ids[i, len(prompt) : len(prompt) + 192] = data.mask
    while (masked := ids == data.mask).any():
        masked &= masked.cumsum(1) <= window
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.logits(model(ids)[masked]).float()
        logits[:, data.mask] = -torch.inf
        confidence = torch.zeros(ids.shape)
        confidence[masked], choice = logits.softmax(-1).max(-1)
        best = confidence.max(1, keepdim=True).values.clamp(max=threshold)
        filled = ids.clone()
        filled[masked] = choice
        commit = masked & (confidence >= best)
        ids = torch.where(commit, filled, ids)
    for i, (_, problem) in enumerate(drawn):
        answer = ids[i, len(encoded[i]) :].tolist()
        answer = answer[: answer.index(data.eos)] if data.eos in answer else answer
        total[problem.family] += 1
        solved[problem.family] += tasks.grade(data.tokenizer.decode(answer), problem)
    return {family: solved[family] / max(total[family], 1) for family in tasks.FAMILIES}


def save_checkpoint(model, tokenizer: Tokenizer, out: Path, card: dict) -> None:
    """Write `model` as a Hugging Face LLaDA directory with fp16 safetensors."""
    out.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": p.detach().half().contiguous() for name, p in model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    rows = model.transformer["wte"].num_embeddings
    token = tokenizer.token_to_id
    config = {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "torch_dtype": "float16",
        **SHAPE, "n_kv_heads": SHAPE["n_heads"], "mlp_ratio": 4, "max_sequence_length": 1280,
        "vocab_size": tokenizer.get_vocab_size(), "embedding_size": rows, "weight_tying": False,
        "block_type": "llama", "block_group_size": 1, "activation_type": "silu", "layer_norm_type": "rms",
        "layer_norm_with_affine": True, "bias_for_layer_norm": False, "attention_layer_norm": False,
        "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False, "scale_logits": False,
        "alibi": False, "rope": True, "rope_full_precision": True,
        "mask_token_id": token("<|mdm_mask|>"), "eos_token_id": token("<|endoftext|>"),
        "pad_token_id": token("<|endoftext|>"),
    }  # fmt: skip
    settings = {
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "mask_token": "<|mdm_mask|>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE,
    }  # fmt: skip
    tokenizer.save(str(out / "tokenizer.json"))
    for name, content in (("config.json", config), ("tokenizer_config.json", settings), ("training.json", card)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def rate(seen: float, total: float) -> float:
    """Warm-up, plateau, and a linear descent over the last sixth."""
    return min(1.0, seen / 3e5) * min(1.0, max(0.02, 6 * (total - seen) / total))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the resumable state and the log")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "export" / "demo")
    parser.add_argument("--init", type=Path, help="start from the weights of this checkpoint directory")
    parser.add_argument("--tokens", type=float, default=50e6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--save-every", type=float, default=180, help="seconds between saved states")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json")) if args.init else train_tokenizer()
    data = Data(tokenizer, args.seed)
    model = Model(rows=-(-data.vocab // 64) * 64)
    model.relate(tokenizer)
    matrices = [p for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if "blocks" not in name or p.ndim != 2]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    index, seen, state = 0, 0.0, args.work / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        index, seen = saved["index"], saved["seen"]
    elif args.init:
        weights = load_file(args.init / "model.safetensors")
        model.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in weights.items()})
        card = json.loads((args.init / "training.json").read_text(encoding="utf-8"))
        index, seen = card["batches"], card["tokens"]
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters, vocabulary {data.vocab}, from token {seen:.0f}", flush=True)
    started = tick = time.time()
    began = seen

    def save(match=None):
        saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                 "index": index, "seen": seen}  # fmt: skip
        torch.save(saved, state.with_suffix(".tmp"))
        os.replace(state.with_suffix(".tmp"), state)
        card = {"tokens": seen, "batches": index, "seed": args.seed, "held_out_exact_match": match}
        save_checkpoint(model, tokenizer, args.out, card)

    losses = []
    while seen < args.tokens:
        noisy, ids, weight = data.batch(index, seen)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(seen, args.tokens)
        with torch.autocast("cpu", torch.bfloat16):
            picked = weight > 0
            logits = model.logits(model(noisy)[picked])
        loss = (F.cross_entropy(logits.float(), ids[picked], reduction="none") * weight[picked]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.soften()
        index, seen = index + 1, seen + ids.numel()
        losses.append(loss.item())
        if index % 25 == 0:
            speed = (seen - began) / (time.time() - started)
            print(f"{index} {seen / 1e6:.2f}M loss {np.mean(losses[-25:]):.4f} {speed:.0f} tok/s", flush=True)
        if time.time() - tick > args.save_every:
            save()
            tick = time.time()
    match = exact_match(model, data, 100)
    print(f"done: {seen / 1e6:.1f}M held-out {match}", flush=True)
    save(match)


if __name__ == "__main__":
    main()
