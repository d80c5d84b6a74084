"""The family of a config.json: found by its keys, and a new family is one file."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import export
import runtime
from engines.bundle import Bundle
from engines.errors import CheckpointError
from export.checkpoint import families
from export.checkpoint.families.llada import FAMILY as LLADA
from export.checkpoint.reader import open_checkpoint
from export.checkpoint.registry import find_family, known
from export.verify import verify as verify_parts
from runtime.evaluation.parity import verify as verify_tokens
from scripts.experiments.make_random_checkpoint import COMMON, SHAPES
from tests.support.cases import refused

TINY: dict[str, Any] = {**COMMON, **SHAPES["tiny"]}


THIRD = textwrap.dedent('''
    """A made-up family: other keys and names, norms of Q and K, a tied head, the next row predicts."""

    from export.checkpoint import Family, Weight
    from export.checkpoint.config_keys import Keys
    from engines.config import ModelConfig

    NEEDED = ("width", "depth", "rows", "mask", "end")


    def read_config(raw):
        keys = Keys("made-up", raw, NEEDED, (), {}, ("model_type",))
        return ModelConfig(
            family="made-up", layers=keys.count("depth"), d_model=keys.count("width"), heads=4, kv_heads=1,
            head_size=16, mlp_size=3 * keys.count("width"), vocab=keys.count("rows"), max_length=128, rope_theta=1e4,
            norm_eps=1e-6, qkv_bias=False, bias=False, tied=True, mask_id=keys.token("mask", 90),
            eos_id=keys.token("end", 90), shift=1, qk_norm=True,
        )


    def weights(config, part):
        d = config.d_model
        if part == "embed":
            return {"wte.weight": Weight("table", (config.vocab, d), False)}
        if part == "head":
            matrix = Weight("table", (config.vocab, d), True)
            return {"ln_f.weight": Weight("norm", (d,), False), "ff_out.weight": matrix}
        sizes = {
            "q_proj": (64, d), "k_proj": (16, d), "v_proj": (16, d), "attn_out": (d, 64), "ff_proj": (3 * d, d),
            "up_proj": (3 * d, d), "ff_out": (d, 3 * d),
        }
        norms = {"attn_norm": d, "ff_norm": d, "q_norm": 16, "k_norm": 16}
        found = {f"{n}.weight": Weight(f"{part}/{n}", shape, True) for n, shape in sizes.items()}
        return found | {f"{n}.weight": Weight(f"{part}/{n}", (size,), False) for n, size in norms.items()}


    FAMILY = Family("made-up", "madeup", ("MadeUp",), read_config, weights, decoding={"window": 4})
''')


@pytest.mark.slow
def test_a_new_family_takes_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built, verified and decoded by the code that is there."""
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "third.py").write_text(THIRD)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    raw = {"model_type": "madeup", "width": 48, "depth": 3, "rows": 90, "mask": 89, "end": 88}
    family = find_family(raw)
    assert {"dream", "llada", "made-up"} < {f.name for f in known()}
    config, generator = family.read_config(raw), torch.Generator().manual_seed(3)
    tensors = {}
    for part in config.parts:
        for weight in family.weights(config, part).values():
            drawn = torch.randn(weight.shape, generator=generator)
            norm = len(weight.shape) == 1
            tensors[weight.tensor] = 1 + 0.2 * drawn if norm else drawn * (1.3 / weight.shape[1] ** 0.5)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    assert open_checkpoint(folder).family.name == "made-up"
    bundle = export.build(folder, tmp_path / "bundle")
    assert all(row.max < 5e-4 * row.scale for row in verify_parts(Bundle.open(bundle), "onnxruntime", 5e-4))
    assert [runs.runs for runs in verify_tokens(bundle, "onnxruntime", 2)] == [2] * 6
    with runtime.load(bundle, "onnxruntime", threads=1) as loaded:
        assert loaded.bundle.manifest.defaults["window"] == 4
        out = loaded.generate([1, 2, 3], gen_length=16, stop_at_eos=False)
        assert len(out.ids) <= 16 and 89 not in out.sequence


def test_an_unknown_family_hears_of_the_known_ones() -> None:
    with refused(CheckpointError, "no family has model_type 'gpt2'", "dream: 'Dream'", "llada: 'llada'"):
        find_family({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})


@pytest.mark.parametrize(
    "keys",
    [{"model_type": "llama"}, {"model_type": None}, {"model_type": ["llada"]},
     {"architectures": ["LLaDATallModelLM"]}, {"architectures": []}, {"architectures": "LLaDAModelLM"}],
)  # fmt: skip
def test_unknown_families_are_told_the_known_ones(keys: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match=r"use a checkpoint of a known family \(.*llada: 'llada' with LLaDAModelLM"
    ):
        find_family(TINY | keys)


def test_family_without_architectures() -> None:
    assert find_family({"model_type": "llada"}) is LLADA
