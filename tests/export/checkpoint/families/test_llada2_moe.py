"""The family LLaDA2.0 against published data: its config, grouped router and logits, and a build for TensorRT."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import export
import runtime
from engines.bundle import Bundle
from engines.eager.layers import route
from engines.errors import CheckpointError
from export.checkpoint.families.llada2_moe import FAMILY as LLADA2
from export.checkpoint.reader import open_checkpoint
from export.checkpoint.registry import find_family
from export.verify import verify as verify_parts
from export.verify.graphs import differences
from tests.support.cases import refused
from tests.support.comparison import BACKENDS
from tests.support.fake_gpu import fake_gpu
from tests.support.families import block_runs
from tests.support.goldens import DATA

GOLDEN = DATA / "llada2-moe-tiny"
RAW = json.loads((GOLDEN / "config.json").read_text())
IDS = {"mask_token_id": 253, "eos_token_id": 244}
BUILD: dict[str, Any] = {"mask_id": 253, "eos_id": 244}
PUBLISHED = RAW | {  # LLaDA2.0-mini
    "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 5120, "moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "rotary_dim": 64, "max_position_embeddings": 32768, "vocab_size": 157184, "pad_token_id": 156892,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.build(GOLDEN, tmp_path_factory.mktemp("llada2") / "bundle", **BUILD)


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(bundle, request.param, threads=1) as loaded:
        yield loaded


def test_a_published_config() -> None:
    assert find_family(PUBLISHED) == LLADA2
    config = LLADA2.read_config({**PUBLISHED, **LLADA2.ids})
    experts = config.experts
    assert experts is not None and experts.sigmoid and experts.dense == (0,) and experts.shared == 512
    assert (experts.count, experts.per_row, experts.groups, experts.kept_groups, experts.scale) == (256, 8, 8, 4, 2.5)
    assert (config.rotated, config.head_size, config.block_length) == (64, 128, 32)
    assert (config.mask_id, config.eos_id, config.pad_id) == (156895, 156892, None)
    assert not config.has_experts(0) and config.has_experts(1)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"n_group": 7}, ("n_group", "divisor")), ({"topk_group": 9}, ("topk_group", "at most")),
     ({"num_experts_per_tok": 129}, ("num_experts_per_tok", "128")), ({"use_qkv_bias": True}, ("use_qkv_bias",)),
     ({"partial_rotary_factor": 1.5}, ("partial_rotary_factor",)), ({"use_rmsnorm": False}, ("use_rmsnorm",)),
     ({"n_group": 256}, ("n_group", "128")), ({"routed_scaling_factor": 0}, ("routed_scaling_factor", "positive"))],
)  # fmt: skip
def test_configs_that_are_refused(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with refused(CheckpointError, "config.json", *words):
        LLADA2.read_config({**PUBLISHED, **LLADA2.ids, **change})


def test_golden_logits(model: runtime.Runtime) -> None:
    """With the block lengths that the data were computed with."""
    stored = load_file(GOLDEN / "logits.safetensors")
    for length, block in ((24, 8), (80, 32)):
        gap = np.abs(model.logits(stored[f"input_ids_{length}"].numpy(), block) - stored[f"logits_{length}"].numpy())
        print(f"{model.backend} logits_{length}: max {gap.max():.2e} mean {gap.mean():.2e}")
        assert gap.max() < 5e-4


def test_golden_routing() -> None:
    """The chosen experts and their weights, from the stored scores: identity matrices stand for the products."""
    stored, checkpoint = load_file(GOLDEN / "logits.safetensors"), open_checkpoint(GOLDEN, IDS)
    config = checkpoint.config
    assert config.experts is not None
    for place, index in enumerate(range(1, config.layers)):
        bias = checkpoint.part(config.parts[1 + index])["router.bias"]
        weights = {"router.weight": torch.eye(config.experts.count), "router.bias": bias}
        odds, chosen = route(config.experts, weights, stored["router_logits_80"][place])
        order, wanted = chosen.argsort(-1), stored["experts_80"][place].argsort(-1)
        assert chosen.gather(-1, order).equal(stored["experts_80"][place].gather(-1, wanted))
        expected = stored["expert_weights_80"][place].gather(-1, wanted)
        assert (odds.gather(-1, order) - expected).abs().max() < 1e-5


@pytest.mark.slow
def test_published_trajectories(model: runtime.Runtime) -> None:
    """With quotas, thresholds, blocks of several lengths and ends; the published loop has no cache, this one has."""
    goldens = json.loads((DATA / "trajectories_llada2-moe-tiny.json").read_text())["trajectories"]
    assert len(goldens) == 30 and not block_runs(model, goldens)


@pytest.mark.slow
def test_published_trajectories_on_a_gpu(tmp_path: Path) -> None:
    """Every third run, on the fake GPU: masks by block in graphs whose rows lie by slot."""
    goldens = json.loads((DATA / "trajectories_llada2-moe-tiny.json").read_text())["trajectories"]
    greedy = [golden for golden in goldens if "torch_seed" not in golden["args"]][::3]
    with fake_gpu():
        bundle = export.build(GOLDEN, tmp_path / "gpu", backends=["tensorrt"], max_length=256, window=8, **BUILD)
        with runtime.load(bundle, "tensorrt") as model:
            assert len(greedy) >= 10 and not block_runs(model, greedy)


@pytest.mark.slow
def test_both_verify(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    assert all(row.max < 5e-4 * row.scale for row in differences(opened))
    assert all(row.max < 5e-4 * row.scale for row in verify_parts(opened, "onnxruntime", 5e-4))
    small = Bundle.open(export.build(GOLDEN, tmp_path / "int8", weights="int8", **BUILD))
    rows = {row.part: row for row in verify_parts(small, "onnxruntime", 1.0)}
    assert 0 < rows["layer_00"].max < 0.1 * rows["layer_00"].scale


@pytest.mark.slow
def test_it_builds_for_tensorrt(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx, which builds without a GPU, is not installed")
    bundle = export.build(
        GOLDEN, tmp_path / "rtx", precision="fp16", backends=["tensorrt"], max_length=256, window=8,
        flavour="tensorrt_rtx", capabilities=["8.9"], **BUILD,
    )  # fmt: skip
    parts = Bundle.open(bundle).engines("tensorrt")["parts"]
    assert all(parts[f"layer_{index:02d}"]["layers"]["ATTENTION_INPUT"] == 1 for index in range(4))
    assert parts["layer_00"]["plans"] != parts["layer_01"]["plans"] == parts["layer_03"]["plans"]
