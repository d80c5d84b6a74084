"""The family iLLaDA against published data: its config, logits, and runs of two published loops."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import export
import runtime
from engines.bundle import Bundle
from engines.errors import CheckpointError
from export.checkpoint.families.illada import FAMILY as ILLADA
from export.checkpoint.reader import open_checkpoint
from export.checkpoint.registry import find_family
from export.verify import verify as verify_parts
from tests.support.cases import refused
from tests.support.comparison import BACKENDS
from tests.support.families import elastic_as_the_oracle, fixed_canvas_runs, growing_runs, llama_oracle, published_gaps
from tests.support.goldens import DATA

GOLDEN = DATA / "illada-tiny"
PUBLISHED = json.loads((GOLDEN / "config.json").read_text()) | {  # GSAI-ML/iLLaDA-8B, as its model card has it
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 155136, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.build(GOLDEN, tmp_path_factory.mktemp("illada") / "bundle", window=16, track_num=2)


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(bundle, request.param, threads=1) as loaded:
        yield loaded


def test_a_published_config() -> None:
    assert find_family(PUBLISHED) == ILLADA
    config = ILLADA.read_config(PUBLISHED | ILLADA.ids)
    assert (config.layers, config.heads, config.kv_heads, config.head_size, config.mlp_size) == (32, 32, 8, 128, 14336)
    assert (config.tied, config.shift, config.qkv_bias, config.mask_id, config.eos_id) == (True, 0, False, 5, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"layer_norm_eps": 1e-5}, ("layer_norm_eps",)), ({"rope_scaling": {"type": "yarn"}}, ("rope_scaling", "yarn")),
     ({"mlp_bias": True}, ("mlp_bias",)), ({"mask_token_id": 2}, ("mask_token_id",))],
)  # fmt: skip
def test_configs_that_are_refused(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with refused(CheckpointError, "config.json", *words):
        ILLADA.read_config(PUBLISHED | ILLADA.ids | change)


def test_ids_that_no_file_names() -> None:
    """The family's published ids are the defaults; others can be given, but not against what a file says."""
    config = open_checkpoint(GOLDEN).config
    assert (config.mask_id, config.eos_ids, config.pad_id) == (5, (2,), 1)
    assert open_checkpoint(GOLDEN, {"mask_token_id": 7}).config.mask_id == 7
    with refused(CheckpointError, "eos_token_id is 2", "--eos-id 9", "leave --eos-id out"):
        open_checkpoint(GOLDEN, {"eos_token_id": 9})


def test_golden_logits_and_hidden_states(model: runtime.Runtime) -> None:
    for gap in published_gaps(model, GOLDEN):
        print(f"{model.backend} {gap.part}: max {gap.max:.2e} mean {gap.mean:.2e}")
        assert gap.max < 5e-4, gap.part


def test_a_padded_row(model: runtime.Runtime) -> None:
    """The published class keeps the positions of padding; a rotary embedding has only their differences."""
    stored = load_file(GOLDEN / "logits.safetensors")
    for ids, mask, expected in zip(
        *(stored[f"{n}_pad"] for n in ("input_ids", "attention_mask", "logits")), strict=True
    ):
        kept = mask.bool()
        gap = np.abs(model.logits(ids[kept].numpy()[None])[0] - expected[kept].numpy())
        assert gap.max() < 5e-4


@pytest.mark.slow
def test_published_trajectories(model: runtime.Runtime) -> None:
    """Those of a fixed canvas: LLaDA's own loop, and the one with a threshold."""
    goldens = json.loads((DATA / "trajectories_illada-tiny.json").read_text())["trajectories"]
    fixed = [golden for golden in goldens if golden["function"] != "illada.var_generate"]
    assert len(fixed) == 12 and not fixed_canvas_runs(model, fixed)


@pytest.mark.slow
def test_published_runs_of_a_growing_answer(model: runtime.Runtime) -> None:
    """With ends inside a block, and with the boost of the end of thinking."""
    goldens = json.loads((DATA / "trajectories_illada-tiny.json").read_text())["trajectories"]
    growing = [golden for golden in goldens if golden["function"] == "illada.var_generate"]
    assert len(growing) == 18 and not growing_runs(model, growing)


@pytest.mark.slow
def test_elastic_against_the_oracle(model: runtime.Runtime) -> None:
    decoder = llama_oracle(GOLDEN, mask_token_id=5)
    elastic_as_the_oracle(model, decoder, eos_id=2, seed=7)


@pytest.mark.slow
def test_its_parts_verify(bundle: Path) -> None:
    assert all(row.max < 5e-4 * row.scale for row in verify_parts(Bundle.open(bundle), "onnxruntime", 5e-4))
