"""The family SDAR against published data: its config, block-causal attention and logits, and a build for TensorRT."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import export
import runtime
from engines.bundle import Bundle
from engines.errors import CheckpointError, OptionError, PromptError
from export.checkpoint.families.sdar import FAMILY as SDAR
from export.checkpoint.reader import open_checkpoint
from export.checkpoint.registry import find_family
from export.verify import verify as verify_parts
from export.verify.graphs import differences
from tests.support.cases import refused
from tests.support.comparison import BACKENDS
from tests.support.fake_gpu import fake_gpu
from tests.support.families import block_runs, published_gaps, sampled_runs
from tests.support.goldens import DATA

GOLDEN = DATA / "sdar-tiny-a"
PUBLISHED = json.loads((GOLDEN / "config.json").read_text()) | {  # SDAR-4B-Chat, whose keys these are
    "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 9728, "vocab_size": 151936, "mask_token_id": 151669, "bos_token_id": 151643,
    "eos_token_id": 151643, "max_position_embeddings": 32768, "max_window_layers": 36,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.build(GOLDEN, tmp_path_factory.mktemp("sdar") / "bundle")


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(bundle, request.param, threads=1) as loaded:
        yield loaded


def test_a_published_config() -> None:
    """Heads are larger than the hidden size over their number."""
    assert find_family(PUBLISHED) == SDAR
    config = SDAR.read_config(PUBLISHED)
    assert (config.layers, config.heads, config.kv_heads, config.head_size, config.d_model) == (36, 32, 8, 128, 2560)
    assert (config.qk_norm, config.block_length, config.mask_id, config.shift) == (True, 4, 151669, 0)
    assert open_checkpoint(GOLDEN).config.eos_ids == (240, 242)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"block_size": None}, ("block_size missing",)), ({"block_size": 0}, ("block_size is 0",)),
     ({"head_dim": 127}, ("head_dim", "even")), ({"attention_bias": True}, ("attention_bias",)),
     ({"use_sliding_window": True}, ("use_sliding_window",))],
)  # fmt: skip
def test_configs_that_are_refused(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with refused(CheckpointError, "config.json", *words):
        SDAR.read_config(PUBLISHED | change)


def test_golden_logits_and_hidden_states(model: runtime.Runtime) -> None:
    for gap in published_gaps(model, GOLDEN):
        print(f"{model.backend} {gap.part}: max {gap.max:.2e} mean {gap.mean:.2e}")
        assert gap.max < 5e-4, gap.part


def test_what_a_row_sees(model: runtime.Runtime) -> None:
    """Another id changes the rows of its own block and of later ones, and of no earlier block."""
    ids = np.arange(3, 27)
    changed = ids.copy()
    changed[9] = 200
    for block in (4, 8, 5):
        gap = np.abs(model.logits(ids, block) - model.logits(changed, block))[0].max(-1)
        first = 9 // block * block
        assert gap[:first].max() == 0 < gap[first:].min()
    with refused(OptionError, "block_length 0", "at least 1"):
        model.logits(ids, 0)


def test_a_block_length_without_blocks(golden: runtime.Runtime) -> None:
    with refused(OptionError, "block_length 4", "block-causal", "leave it out"):
        golden.logits([1, 2, 3], 4)


@pytest.mark.slow
def test_published_trajectories(model: runtime.Runtime) -> None:
    """All ways of committing, prompts that end inside a block, ends, and sampled runs on their own draws."""
    goldens = json.loads((DATA / "trajectories_sdar-tiny-a.json").read_text())["trajectories"]
    sampled = [golden for golden in goldens if "torch_seed" in golden["args"]]
    greedy = [golden for golden in goldens if "torch_seed" not in golden["args"]]
    assert len(greedy) == 42 and not block_runs(model, greedy)
    assert len(sampled) == 5 and not sampled_runs(model, sampled)


def test_rows_of_a_run(model: runtime.Runtime) -> None:
    """The whole prompt and its block, then the block alone; a new block with the one before it."""
    out = model.generate(list(range(3, 13)), gen_length=9, stop_at_eos=False)
    assert [event.active for event in out.trace] == [12, 4, *[8, 4, 4, 4] * 2]
    assert (out.tokens, len(out.sequence), out.ended) == (9, 20, "length")
    assert out.computed_fraction < 0.5


@pytest.mark.parametrize(
    ("policy", "options", "words"),
    [("elastic", {}, ("elastic", "block-causal", "--policy block")), ("full", {}, ("full", "--policy block")),
     ("block", {"steps": 5}, ("steps", "1 … 4", "positions")),
     ("block", {"threshold": 0.9, "sequential": True}, ("sequential", "leave one out"))],
)  # fmt: skip
def test_policies_that_are_refused(
    model: runtime.Runtime, policy: str, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused(OptionError, *words):
        model.generate([5, 6], policy, gen_length=4, **options)


def test_a_block_beyond_the_length(model: runtime.Runtime) -> None:
    """The last block is completed, so its end counts."""
    with refused(PromptError, "gen_length", "exceed the bundle's length 2048"):
        model.generate([5], gen_length=2046, block_length=300)


def test_block_needs_block_causal_attention(golden: runtime.Runtime) -> None:
    with refused(OptionError, "policy block", "block-causal"):
        golden.generate([5, 6], "block", gen_length=4)


@pytest.mark.slow
def test_published_trajectories_on_a_gpu(tmp_path: Path) -> None:
    """Every third run, on the fake GPU: masks by block in graphs whose rows lie by slot."""
    goldens = json.loads((DATA / "trajectories_sdar-tiny-a.json").read_text())["trajectories"]
    greedy = [golden for golden in goldens if "torch_seed" not in golden["args"]][::3]
    with fake_gpu():
        bundle = export.build(GOLDEN, tmp_path / "gpu", backends=["tensorrt"], max_length=256, window=8)
        with runtime.load(bundle, "tensorrt") as model:
            assert len(greedy) >= 10 and not block_runs(model, greedy)


@pytest.mark.slow
def test_both_verify(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert all(row.max < 5e-4 * row.scale for row in differences(opened))
    assert all(row.max < 5e-4 * row.scale for row in verify_parts(opened, "onnxruntime", 5e-4))


@pytest.mark.slow
def test_it_builds_for_tensorrt(tmp_path: Path) -> None:
    """The mask of blocks does not stop attention from being native."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx, which builds without a GPU, is not installed")
    bundle = export.build(
        GOLDEN, tmp_path / "rtx", precision="fp16", backends=["tensorrt"], max_length=256, window=8,
        flavour="tensorrt_rtx", capabilities=["8.9"],
    )  # fmt: skip
    parts = Bundle.open(bundle).engines("tensorrt")["parts"]
    assert all(parts[f"layer_{index:02d}"]["layers"]["ATTENTION_INPUT"] == 1 for index in range(4))
