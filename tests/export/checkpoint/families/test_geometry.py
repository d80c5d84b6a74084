"""The published sizes and groups of heads, with random weights: decoding alone and batched, few bits, and TensorRT.

The tiny checkpoints have heads of 16 or 24 numbers; published ones have 128, in groups of 1, 4 and 7 to a key.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import export
import runtime
from engines.bundle import Bundle
from export.checkpoint.registry import find_family
from tests.support.cases import DATA

IDS = {"mask_token_id": 5, "eos_token_id": 4}  # smaller than the published ones; prompts have larger ids
GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {  # family -> its tiny checkpoint, and the published heads
    "dream": ("dream-tiny", {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 896}),
    "illada": ("illada-tiny", IDS | {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 512}),
    "llada-moe": (
        "llada-moe-tiny-a",
        IDS | {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 256, "moe_layer_freq": [1, 1]},
    ),
    "sdar": (
        "sdar-tiny-a", {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "hidden_size": 320},
    ),
    "llada2-moe": (
        "llada2-moe-tiny",
        IDS | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "hidden_size": 256},
    ),
}  # fmt: skip
PROMPTS = [np.arange(6, 6 + count) for count in (24, 7, 1)]


@pytest.fixture(scope="module", params=GEOMETRIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights."""
    tiny, changes = GEOMETRIES[request.param]
    raw = json.loads((DATA / tiny / "config.json").read_text()) | {"num_hidden_layers": 2} | changes
    out = tmp_path_factory.mktemp(request.param) / "checkpoint"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(raw))
    family, rng = find_family(raw), np.random.default_rng(0)
    config = family.read_config(raw)
    tensors: dict[str, Any] = {}
    for part in config.parts:
        for weight in family.weights(config, part).values():
            for name in weight.tensors:
                shape = weight.stored_shape
                scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.2
                drawn = rng.standard_normal(shape) * scale + (len(shape) == 1 and name.endswith("norm.weight"))
                tensors.setdefault(name, drawn.astype(np.float32))
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return export.build(checkpoint, checkpoint.parent / "bundle", max_length=128, window=8)


@pytest.fixture(scope="module")
def answers(bundle: Path) -> Iterator[dict[str, Any]]:
    """By back end: the answers to each prompt alone, and to all in a batch."""
    found = {}
    for backend in ("eager", "onnxruntime"):
        with runtime.load(bundle, backend, threads=1) as model:
            alone = [model.generate(prompt, gen_length=16) for prompt in PROMPTS]
            found[backend] = alone, model.generate_batch(PROMPTS, gen_length=16)
    yield found


def test_decoding(answers: dict[str, Any]) -> None:
    """Both back ends decide alike, and a batch as its prompts alone."""
    expected = [out.sequence for out in answers["eager"][0]]
    for backend, (alone, batch) in answers.items():
        assert [out.sequence for out in alone] == expected, backend
        assert [out.sequence for out in batch] == expected, backend


def test_int8(bundle: Path, checkpoint: Path) -> None:
    """Every matrix of the layers in 8 bits, experts included: logits stay near those of the weights as they are.

    In the mean: a random router is undecided in some row, which then takes another expert.
    """
    small = export.build(checkpoint, checkpoint.parent / "int8", max_length=128, window=8, weights="int8")
    logits = []
    for folder in (bundle, small):
        with runtime.load(folder, "onnxruntime", threads=1) as model:
            logits.append(model.logits(PROMPTS[0]))
    gap = np.abs(logits[0] - logits[1])
    print(
        f"int8: max {gap.max():.3f} mean {gap.mean():.4f} where logits are {np.abs(logits[0]).mean():.2f} in the mean"
    )
    assert 0 < gap.mean() < 0.05 * np.abs(logits[0]).mean()


@pytest.mark.slow
def test_tensorrt_builds(checkpoint: Path) -> None:
    """tensorrt-rtx compiles it ahead of time, with its own attention, rotary and cache update in every layer."""
    built = export.build(
        checkpoint, checkpoint.parent / "rtx", precision="fp16", backends=["tensorrt"], flavour="tensorrt_rtx",
        capabilities=["8.9"], max_length=128, window=8,
    )  # fmt: skip
    parts = Bundle.open(built).engines("tensorrt")["parts"]
    for index in range(2):
        kinds = parts[f"layer_{index:02d}"]["layers"]
        counts = {kind: kinds.get(kind, 0) for kind in ("ATTENTION_INPUT", "ROTARY_EMBEDDING", "KV_CACHE_UPDATE")}
        print(index, counts)
        assert counts == {"ATTENTION_INPUT": 1, "ROTARY_EMBEDDING": 2, "KV_CACHE_UPDATE": 2}
