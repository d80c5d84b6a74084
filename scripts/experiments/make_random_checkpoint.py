"""Write a LLaDA checkpoint with random weights, shard by shard.

    python scripts/experiments/make_random_checkpoint.py --shape llada-8b --out DIR --dtype fp16
    python scripts/experiments/make_random_checkpoint.py --shape tiny --out DIR --layers 3 --kv-heads 4

For tests and timing: every shape has LLaDA's layout, so a run costs the same, but
its answers mean nothing. The same arguments produce the same bytes.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engines.config import ModelConfig
from engines.errors import ElasticError, OptionError
from export.checkpoint.families.llada import FAMILY as LLADA

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

COMMON: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "block_type": "llama", "block_group_size": 1,
    "activation_type": "silu", "layer_norm_type": "rms", "layer_norm_with_affine": True, "bias_for_layer_norm": False,
    "attention_layer_norm": False, "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False,
    "scale_logits": False, "alibi": False, "rope": True, "rope_full_precision": True, "weight_tying": False,
    "mlp_ratio": 4, "rms_norm_eps": 1e-5,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 64, "rope_theta": 10000.0,
        "vocab_size": 64, "embedding_size": 64, "max_sequence_length": 256,
        "mask_token_id": 63, "eos_token_id": 62, "pad_token_id": 62,
    },
    "demo": {
        "d_model": 128, "n_layers": 8, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 352, "rope_theta": 10000.0,
        "vocab_size": 1006, "embedding_size": 1024, "max_sequence_length": 1280,
        "mask_token_id": 1005, "eos_token_id": 1001, "pad_token_id": 1001,
    },
    "llada-8b": {
        "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
        "rope_theta": 500000.0, "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096,
        "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081,
    },
}  # fmt: skip

# The standard deviation of a matrix is its gain over sqrt(in). With these gains attention is neither flat nor on a
# single key, and the confidences of masked positions spread over about 0.1 to 0.99.
GAINS = {"q_proj": 1.7, "k_proj": 1.7, "v_proj": 1.2, "attn_out": 1.2, "ff_proj": 1.3, "up_proj": 1.3, "ff_out": 1.2}
HEAD_GAIN = 4.5


def make_checkpoint(
    out: str | Path, shape: dict[str, Any], dtype: str = "fp32", seed: int = 0, shard_bytes: int = 10**9
) -> Path:
    """Write the checkpoint whose config.json is `COMMON` with the keys of `shape`; returns its directory.

    One shard at a time is in memory: as many parts as `shard_bytes` holds, at least one.
    Raises OptionError if `out` is not empty, CheckpointError for a shape that is not implemented.
    """
    raw = {**COMMON, **shape, "torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    config = LLADA.read_config(raw)
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise OptionError(f"{out} is not empty; give a new folder, or remove it first")
    out.mkdir(parents=True, exist_ok=True)
    normals = Normals(seed, DTYPES[dtype])
    shards = list(_shards(config, shard_bytes // DTYPES[dtype].itemsize))
    places: dict[str, str] = {}
    total = 0
    for number, parts in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for part in parts:
            for local, weight in LLADA.weights(config, part).items():
                if weight.tensor not in places:  # a tied head has the embedding's matrix
                    places[weight.tensor] = file
                    tensors[weight.tensor] = _tensor(config, part, local, weight.shape, normals)
        save_file(tensors, out / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    for name, content in (("model.safetensors.index.json", index), ("config.json", raw)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return out


def _shards(config: ModelConfig, limit: int) -> Iterator[list[str]]:
    """The parts in order, grouped so that a group has at most `limit` numbers or is a single part."""
    group: list[str] = []
    size = 0
    for part in config.parts:
        count = sum(math.prod(weight.shape) for weight in LLADA.weights(config, part).values())
        if group and size + count > limit:
            yield group
            group, size = [], 0
        group.append(part)
        size += count
    yield group


def _tensor(config: ModelConfig, part: str, local: str, shape: tuple[int, ...], normals: "Normals") -> torch.Tensor:
    """Random numbers for one tensor, as stored."""
    name, kind = local.split(".")
    if kind == "bias":
        return normals.draw(shape, 0.2)
    if len(shape) == 1:  # of a norm
        return normals.draw(shape, 0.2) + 1
    if part == "head" or (config.tied and part == "embed"):
        tensor = normals.draw(shape, HEAD_GAIN / math.sqrt(config.d_model))
        tensor[config.mask_id] *= 0.1  # [MASK] is hardly ever the arg-max, as in a trained model
        return tensor
    return normals.draw(shape, 1.0 if part == "embed" else GAINS[name] / math.sqrt(shape[1]))


class Normals:
    """Seeded N(0, deviation²) numbers; a large tensor repeats one chunk of them from a random start.

    To draw the 8 billion numbers of LLaDA-8B takes minutes; to copy a chunk takes no
    longer than to write it. The chunk's length is a prime, so no two rows of a matrix
    are the same.
    """

    CHUNK = 1_048_573

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.chunk = torch.randn(self.CHUNK, generator=self.generator)

    def draw(self, shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        size = math.prod(shape)
        if size <= self.CHUNK:
            return (torch.randn(shape, generator=self.generator) * deviation).to(self.dtype)
        start = int(torch.randint(self.CHUNK, (), generator=self.generator))
        tile = (self.chunk.roll(-start) * deviation).to(self.dtype)
        flat = torch.empty(size, dtype=self.dtype)
        for begin in range(0, size, self.CHUNK):
            flat[begin : begin + self.CHUNK] = tile[: size - begin]
        return flat.view(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    overrides = {
        "layers": "n_layers", "heads": "n_heads", "kv-heads": "n_kv_heads", "d-model": "d_model",
        "mlp": "mlp_hidden_size", "vocab": "vocab_size", "max-length": "max_sequence_length",
    }  # fmt: skip
    for option, key in overrides.items():
        parser.add_argument(f"--{option}", type=int, dest=key, metavar="N", help=f"{key} other than the shape's")
    options = vars(parser.parse_args())
    changed = {key: options[key] for key in overrides.values() if options[key] is not None}
    if vocab := changed.get("vocab_size"):
        changed |= {"embedding_size": vocab, "mask_token_id": vocab - 1}
        changed |= {"eos_token_id": vocab - 2, "pad_token_id": vocab - 2}
    try:
        out = make_checkpoint(options["out"], SHAPES[options["shape"]] | changed, options["dtype"], options["seed"])
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(out)


if __name__ == "__main__":
    main()
