"""The family Dream against published data: its config, logits, schedules, and a build for TensorRT."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import export
import runtime
from engines.bundle import Bundle
from engines.errors import CheckpointError
from engines.options import values_of
from export.checkpoint.families.dream import FAMILY as DREAM
from export.checkpoint.reader import open_checkpoint
from export.checkpoint.registry import find_family
from export.verify import verify as verify_parts
from runtime.evaluation.parity import verify as verify_tokens
from tests.support.cases import refused
from tests.support.comparison import BACKENDS, NOISE
from tests.support.families import elastic_as_the_oracle, llama_oracle, published_gaps
from tests.support.goldens import DATA, confidence_gap, trajectory_difference

GOLDEN = DATA / "dream-tiny"


PUBLISHED = {  # Dream-org/Dream-v0-Instruct-7B
    "architectures": ["DreamModel"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "mask_token_id": 151666, "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "Dream",
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "pad_token_id": 151643,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.46.2", "use_cache": True,
    "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.build(GOLDEN, tmp_path_factory.mktemp("dream") / "bundle", window=16, track_num=2)


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(bundle, request.param, threads=1) as loaded:
        yield loaded


def test_a_published_config() -> None:
    config = find_family(PUBLISHED).read_config(PUBLISHED)
    assert (config.family, config.layers, config.d_model, config.head_size) == ("dream", 28, 3584, 128)
    assert (config.heads, config.kv_heads, config.qkv_bias, config.bias, config.shift) == (28, 4, True, False, 1)
    assert (config.mask_id, config.eos_id, config.vocab, config.tied) == (151666, 151643, 152064, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"hidden_act": "gelu"}, ("hidden_act", '"gelu"', '"silu"')), ({"use_sliding_window": True}, ("sliding",)),
     ({"rope_scaling": {"type": "yarn"}}, ("rope_scaling", "yarn")), ({"mask_token_id": None}, ("mask_token_id",)),
     ({"num_key_value_heads": 5}, ("num_key_value_heads", "divisor")), ({"colour": 1}, ("dream", "colour = 1")),
     ({"hidden_size": 100}, ("hidden_size", "per head")), ({"mask_token_id": 151643}, ("mask_token_id",))],
)  # fmt: skip
def test_configs_that_are_refused(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with refused(CheckpointError, "config.json", *words):
        DREAM.read_config(PUBLISHED | change)


def test_golden_logits_and_hidden_states(model: runtime.Runtime) -> None:
    """As the model gives them: which row predicts a position is the decoder's business."""
    for gap in published_gaps(model, GOLDEN):
        print(f"{model.backend} {gap.part}: max {gap.max:.2e} mean {gap.mean:.2e}")
        assert gap.max < 5e-4, gap.part


@pytest.mark.slow
def test_published_trajectories(model: runtime.Runtime) -> None:
    """Its schedule, and its block caches, which commit the first mask of a block alone."""
    content = json.loads((DATA / "trajectories_dream-tiny.json").read_text())
    worst = 0.0
    for golden in content["trajectories"]:
        args = golden["args"]
        options: dict[str, Any] = {"gen_length": 32, "stop_at_eos": False}
        if "block_length" in args:
            policy = "dual" if args["dual_cache"] else "prefix"
            options |= {"threshold": args["threshold"], "block_length": args["block_length"]}
        elif args["alg"] == "confidence_threshold":  # commits no more than 32 / steps a step
            policy = "full"
            options |= {"block_length": 32} | ({"steps": 32} if args["steps"] == 32 else {"threshold": 0.9})
        else:  # the published driver ranks by the 50 likeliest tokens unless told otherwise
            policy = "timesteps"
            options |= {"alg": args["alg"], "steps": args["steps"], "top_k": 50}
        out = model.generate(golden["prompt_ids"], policy, **options)
        assert out.sequence == golden["output_ids"], golden["id"]
        assert [event.active for event in out.trace] == golden["forward_lengths"], golden["id"]
        if policy == "full":
            assert trajectory_difference(out, golden) is None
            worst = max(worst, confidence_gap(out, golden))
        elif policy == "timesteps":
            for event, step in zip(out.trace, golden["steps"], strict=True):
                assert event.committed == sorted(step["positions"]), f"{golden['id']} step {event.step}"
    print(f"{model.backend}: {len(content['trajectories'])} trajectories, confidence max {worst:.2e}")
    assert len(content["trajectories"]) == 18 and worst < NOISE


@pytest.mark.slow
def test_elastic_against_the_oracle(model: runtime.Runtime) -> None:
    """The rows that predict the window are always fresh; drift, refreshes and all else as ever."""
    elastic_as_the_oracle(model, llama_oracle(GOLDEN, include_qkv_bias=True, shift=1), eos_id=30, seed=5)


def test_its_defaults(bundle: Path, tmp_path: Path) -> None:
    """A window of 32, with room for the rows that predict it; a length it was trained on."""
    with runtime.load(bundle, "eager", threads=1) as loaded:
        config, capacity = loaded.bundle.config, loaded.bundle.capacity
        assert capacity.rows == 3 * 16 + 4 * 2 and capacity.max_length == 2048 and config.shift == 1
    job = export.build(GOLDEN, tmp_path / "plain", backends=[])
    with runtime.load(job, "eager", threads=1) as loaded:
        assert loaded.bundle.manifest.defaults["window"] == loaded.bundle.capacity.window == 32
    assert DREAM.length == 2048


def test_generation_defaults_of_its_schedule(tmp_path: Path) -> None:
    """The published generation_config.json names the algorithm; null says nothing."""
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "dream"))
    content = {"alg": "origin", "alg_temp": None, "eps": 0.001, "steps": 512, "mask_token_id": None, "top_p": None}
    (folder / "generation_config.json").write_text(json.dumps(content))
    with runtime.load(export.build(folder, tmp_path / "bundle", backends=[]), "eager", threads=1) as loaded:
        chosen, _ = loaded.resolve("timesteps", {})
        assert values_of(chosen) == {"steps": None, "alg": "origin", "alg_temp": 0.0, "eps": 0.001, "cfg_scale": 0.0}
        assert vars(loaded.resolve("timesteps", {"alg": "entropy"})[0])["alg"] == "entropy"


@pytest.mark.slow
def test_both_verify(bundle: Path) -> None:
    assert all(row.max < 5e-4 * row.scale for row in verify_parts(Bundle.open(bundle), "onnxruntime", 5e-4))
    assert [runs.runs for runs in verify_tokens(bundle, "onnxruntime", 2)] == [2] * 6


@pytest.mark.slow
def test_it_builds_for_tensorrt(tmp_path: Path) -> None:
    """Grouped heads, biases and all: native layers, or the build would fail."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx, which builds without a GPU, is not installed")
    bundle = export.build(
        GOLDEN, tmp_path / "rtx", precision="fp16", backends=["tensorrt"], max_length=256, window=8,
        flavour="tensorrt_rtx", capabilities=["8.9"],
    )  # fmt: skip
    engines = Bundle.open(bundle).engines("tensorrt")
    assert {"embed", "layer_00", "layer_03", "head"} <= set(engines["parts"])


def test_the_padding_that_ends_answers_of_diffucoder(tmp_path: Path) -> None:
    """Its tokenizer pads with a token of its own, and the instructed model fills the rest of an answer with it."""
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "DiffuCoder-7B-Instruct"))
    tokens = {"242": {"content": "<|im_end|>"}, "252": {"content": "<|mask|>"}, "253": {"content": "<|dlm_pad|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    config = open_checkpoint(folder).config
    assert (config.eos_ids, config.end_ids, config.pad_id) == ((240, 253), (240, 253, 242), 240)
