"""The family LLaDA-MoE against published data: its config, routing, logits and runs; the decisions of `elastic`."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
import runtime
from engines.bundle import Bundle
from engines.eager import layers
from engines.errors import CheckpointError
from export.checkpoint.families.llada_moe import FAMILY as MOE
from export.checkpoint.reader import open_checkpoint
from export.checkpoint.registry import find_family
from export.verify import verify as verify_parts
from export.verify.graphs import differences
from tests.support.cases import refused
from tests.support.comparison import BACKENDS
from tests.support.fake_gpu import fake_gpu
from tests.support.families import elastic_as_the_oracle, fixed_canvas_runs, llama_oracle, published_gaps
from tests.support.goldens import DATA

GOLDEN = DATA / "llada-moe-tiny-a"
RAW = json.loads((GOLDEN / "config.json").read_text())
PUBLISHED = RAW | {  # LLaDA-MoE-7B-A1B, as texts about it have it
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
    "num_experts": 64, "num_experts_per_tok": 8, "expert_intermediate_size": 1024, "dense_intermediate_size": 8192,
    "moe_layer_freq": [1] * 16, "vocab_size": 157184, "max_position_embeddings": 8192, "eos_token_id": 156892,
}  # fmt: skip
CLOSE = 2e-5  # gaps between experts below which another order of summation may choose another
BUILD: dict[str, Any] = {"mask_id": 255, "window": 16, "track_num": 2}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.build(GOLDEN, tmp_path_factory.mktemp("moe") / "bundle", **BUILD)


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(bundle, request.param, threads=1) as loaded:
        yield loaded


@pytest.fixture
def half_dense(tmp_path: Path) -> Path:
    """The golden checkpoint with a plain network, of random numbers, in its first and third layer."""
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "dense"))
    tensors = {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}
    for shard in (*folder.glob("model*.safetensors*"), folder / "logits.safetensors"):
        shard.unlink(missing_ok=True)
    random = torch.Generator().manual_seed(3)
    kept = {n: t for n, t in tensors.items() if n.startswith(("model.", "lm_head")) and not n.startswith(
        ("model.layers.0.mlp", "model.layers.2.mlp"))}  # fmt: skip
    for layer in (0, 2):
        for name, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
            kept[f"model.layers.{layer}.mlp.{name}_proj.weight"] = torch.randn(shape, generator=random) / 8
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(RAW | {"moe_layer_freq": [0, 1, 0, 1]}))
    return folder


def test_a_published_config() -> None:
    """The architecture tells it from LLaDA, whose model_type it has."""
    assert find_family(PUBLISHED) == MOE and find_family(PUBLISHED | {"architectures": None}) != MOE
    config = MOE.read_config({**PUBLISHED, **MOE.ids})
    assert config.experts is not None and not config.experts.dense and config.qk_norm
    assert (config.experts.count, config.experts.per_row, config.experts.size) == (64, 8, 1024)
    assert (config.layers, config.head_size, config.mask_id, config.eos_id) == (16, 128, 156895, 156892)
    assert config.layer_numbers == 4 * 2048**2 + 3 * 2048 * 64 * 1024


@pytest.mark.parametrize(
    ("change", "words"),
    [({"shared_expert_intermediate_size": -1}, ("shared_expert",)), ({"moe_layer_freq": [1]}, ("moe_layer_freq", "16")),
     ({"moe_router_enable_expert_bias": True}, ("expert_bias",)), ({"num_experts_per_tok": 65}, ("at most", "64")),
     ({"clip_qkv": 8.0}, ("clip_qkv",)), ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
     ({"moe_layer_freq": [2] * 16}, ("moe_layer_freq",)), ({"num_experts": None}, ("num_experts", "missing"))],
)  # fmt: skip
def test_configs_that_are_refused(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with refused(CheckpointError, "config.json", *words):
        MOE.read_config({**PUBLISHED, **MOE.ids, **change})


def test_a_mask_that_nothing_names() -> None:
    """The published id lies beyond this vocabulary."""
    with refused(CheckpointError, "mask_token_id missing", "--mask-id"):
        open_checkpoint(GOLDEN)


def test_golden_logits_and_hidden_states(model: runtime.Runtime) -> None:
    for gap in published_gaps(model, GOLDEN):
        print(f"{model.backend} {gap.part}: max {gap.max:.2e} mean {gap.mean:.2e}")
        assert gap.max < 5e-4, gap.part


def test_golden_routing() -> None:
    """The experts of every row of every layer, and the probabilities they are weighted with."""
    checkpoint, stored = open_checkpoint(GOLDEN, {"mask_token_id": 255}), load_file(GOLDEN / "logits.safetensors")
    config = checkpoint.config
    assert config.experts is not None
    tables, length = layers.rotary_tables(80, config.head_size, config.rope_theta), 80
    for index in range(config.layers):
        weights = checkpoint.part(config.parts[1 + index])
        k, v = (torch.zeros(1, config.kv_heads, length, config.head_size) for _ in "kv")
        seen: list[torch.Tensor] = []
        routed: dict[str, Any] = weights | {"router.weight": Spy(weights["router.weight"], seen)}
        hidden = stored["hidden_80"][index][None]
        layers.layer(config, routed, tables, hidden, torch.arange(length)[None], torch.ones(1, length).bool(), 0, k, v)
        odds, chosen = layers.route(config.experts, weights, seen[0][0])
        order, wanted = chosen.argsort(-1), stored["experts_80"][index].argsort(-1)
        assert chosen.gather(-1, order).equal(stored["experts_80"][index].gather(-1, wanted))
        expected = stored["expert_weights_80"][index].gather(-1, wanted)
        assert (odds.gather(-1, order) - expected).abs().max() < 1e-5


class Spy:
    """A matrix that notes what it is multiplied with."""

    def __init__(self, matrix: torch.Tensor, seen: list[torch.Tensor]):
        self.matrix, self.seen = matrix, seen

    def __rmatmul__(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return x @ self.matrix


@pytest.mark.slow
def test_published_trajectories(model: runtime.Runtime) -> None:
    """Runs that differ are listed with the gap between the experts that were chosen and those that were not."""
    goldens = json.loads((DATA / "trajectories_llada-moe-tiny-a.json").read_text())["trajectories"]
    apart = fixed_canvas_runs(model, goldens)
    assert len(goldens) == 27 and len(apart) <= 3
    assert all(margins["router_score_gap"] < CLOSE for _, _, margins in apart)


@pytest.mark.slow
def test_elastic_against_the_oracle(model: runtime.Runtime) -> None:
    elastic_as_the_oracle(model, llama_oracle(GOLDEN, mask_token_id=255), eos_id=250, seed=11)


@pytest.mark.slow
def test_elastic_on_a_gpu(tmp_path: Path) -> None:
    """All experts as one product, on the fake GPU."""
    with fake_gpu():
        bundle = export.build(GOLDEN, tmp_path / "gpu", backends=["tensorrt"], max_length=256, **BUILD)
        with runtime.load(bundle, "tensorrt") as model:
            elastic_as_the_oracle(model, llama_oracle(GOLDEN, mask_token_id=255), eos_id=250, seed=11)


@pytest.mark.slow
def test_layers_with_and_without_experts(half_dense: Path, tmp_path: Path) -> None:
    """Both dialects of graphs, and 8-bit weights; the router keeps its precision."""
    bundle = Bundle.open(export.build(half_dense, tmp_path / "plain", **BUILD))
    assert bundle.config.experts is not None and bundle.config.experts.dense == (0, 2)
    assert all(row.max < 5e-4 * row.scale for row in differences(bundle))
    assert all(row.max < 5e-4 * row.scale for row in verify_parts(bundle, "onnxruntime", 5e-4))
    small = Bundle.open(export.build(half_dense, tmp_path / "int8", weights="int8", **BUILD))
    rows = {row.part: row for row in verify_parts(small, "onnxruntime", 1.0)}
    print({name: f"{row.max:.3f} of {row.scale:.1f}" for name, row in rows.items()})
    assert 0 < rows["layer_00"].max < 0.1 * rows["layer_00"].scale


@pytest.mark.slow
def test_it_builds_for_tensorrt(half_dense: Path, tmp_path: Path) -> None:
    """Layers with experts share a plan, and so do those without; attention is native in both."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx, which builds without a GPU, is not installed")
    bundle = export.build(
        half_dense, tmp_path / "rtx", precision="fp16", backends=["tensorrt"], max_length=256, window=8, mask_id=255,
        flavour="tensorrt_rtx", capabilities=["8.9"],
    )  # fmt: skip
    parts = Bundle.open(bundle).engines("tensorrt")["parts"]
    plans = [parts[f"layer_{index:02d}"]["plans"] for index in range(4)]
    assert plans[0] == plans[2] != plans[1] == plans[3]
    assert all(parts[f"layer_{index:02d}"]["layers"]["ATTENTION_INPUT"] == 1 for index in range(4))
