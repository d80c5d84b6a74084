"""Names of tensors: as published, as other savers write them, and as training tools wrap them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import export
import runtime
from engines.errors import CheckpointError
from export.checkpoint import llama
from export.checkpoint.families.llada import FAMILY as LLADA
from export.checkpoint.reader import INDEX, SINGLE, open_checkpoint
from tests.support.cases import GOLDEN, refused
from tests.support.checkpoints import edit, rewrite, stored
from tests.support.goldens import DATA
from tests.support.vision import copy_checkpoint

LLAMA_KEYS = {
    "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads", "intermediate_size": "mlp_hidden_size", "vocab_size": "embedding_size",
    "max_position_embeddings": "max_sequence_length", "rope_theta": "rope_theta", "rms_norm_eps": "rms_norm_eps",
    "mask_token_id": "mask_token_id", "eos_token_id": "eos_token_id", "model_type": "model_type",
    "architectures": "architectures",
}  # fmt: skip


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, torch.Tensor]], None]:
    """A change of a checkpoint's tensors: each gets another name."""

    def all_of(tensors: dict[str, torch.Tensor]) -> None:
        found = {change(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(found)

    return all_of


def wrap_all(folder: Path) -> Path:
    """Put all weights into one file, with the names that DDP and torch.compile leave."""
    tensors = {f"module._orig_mod.{name}": tensor.clone() for name, tensor in stored(folder).items()}
    for path in (*folder.glob("model*.safetensors"), folder / INDEX):
        path.unlink()
    save_file(tensors, folder / SINGLE)
    return folder


def llama_named(folder: Path) -> dict[str, str]:
    """Names of Llama's classes by the published ones."""
    config = open_checkpoint(folder).config
    return {
        weight.tensor: llama.weights(config, part)[local].tensor
        for part in config.parts
        for local, weight in LLADA.weights(config, part).items()
    }


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"module.base_model.model.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."),
        lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.module."),
        lambda name: f"model.{name}",
        lambda name: name.removeprefix("model."),
    ],
)
def test_wrapped_names(single: Path, wrap: Callable[[str], str]) -> None:
    wanted = open_checkpoint(single).identity
    rewrite(single, renamed(wrap))
    assert open_checkpoint(single).identity == wanted, "the same model"


def test_wrapped_names_of_other_families(tmp_path: Path) -> None:
    for folder in (Path(shutil.copytree(DATA / "dream-tiny", tmp_path / "dream")), copy_checkpoint(tmp_path)):
        wanted = open_checkpoint(folder).identity
        assert open_checkpoint(wrap_all(folder)).identity == wanted


def test_wrapped_names_must_all_be_right(single: Path) -> None:
    """Names are made right by one rule for all, or not at all."""
    q = "model.transformer.blocks.1.q_proj.weight"
    rewrite(single, renamed(lambda name: f"module.{name}"))
    rewrite(single, lambda tensors: tensors.pop(f"module.{q}"))
    with refused(CheckpointError, f"lacks {q} [32, 32] of part layer_01"):
        open_checkpoint(single)
    rewrite(single, lambda tensors: tensors.update({f"module.{q}": torch.ones(32, 16)}))
    with refused(CheckpointError, f"module.{q} of part layer_01 has shape [32, 16]"):
        open_checkpoint(single)
    rewrite(single, lambda tensors: tensors.update({f"module.{q}": torch.ones(32, 32), q: torch.ones(32, 32)}))
    with refused(CheckpointError, "lacks"):
        open_checkpoint(single)


def test_two_sets_of_weights(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({f"ema.{name}": tensor * 1 for name, tensor in tensors.items()}))
    with refused(
        CheckpointError, "holds 20 tensors that the model", "ema.model.transformer", "save the model without them"
    ):
        open_checkpoint(single)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("keys", ["published", "llama"])
def test_llada_with_names_of_llama(single: Path, keys: str, wrapped: bool) -> None:
    """The same numbers in every part, whichever keys config.json has."""
    wanted, names = open_checkpoint(single), llama_named(single)
    tensors = {part: wanted.part(part) for part in wanted.config.parts}
    rewrite(single, renamed(lambda name: "module." * wrapped + names[name]))
    if keys == "llama":

        def change(config: dict[str, object]) -> None:
            found = {new: config[old] for new, old in LLAMA_KEYS.items()} | {"pad_token_id": config["pad_token_id"]}
            config.clear()
            config.update(found, hidden_act="silu", attention_bias=False, pretraining_tp=1, head_dim=8)

        edit(single / "config.json", change)
    came = open_checkpoint(single)
    assert came.config == wanted.config
    for part, values in tensors.items():
        read = came.part(part)
        assert list(read) == list(values) and all(torch.equal(read[local], values[local]) for local in values)


def test_a_tied_head_with_names_of_llama(single: Path) -> None:
    names = llama_named(single)
    edit(single / "config.json", lambda config: config.update(weight_tying=True))
    rewrite(single, renamed(lambda name: names[name]))
    rewrite(single, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 1}))
    came = open_checkpoint(single)
    assert torch.equal(came.part("head")["ff_out.weight"], came.part("embed")["wte.weight"].t())


@pytest.mark.slow
def test_a_bundle_of_wrapped_names_decodes_alike(tmp_path: Path) -> None:
    other = wrap_all(Path(shutil.copytree(GOLDEN, tmp_path / "other")))
    ids = []
    for checkpoint in (GOLDEN, other):
        with runtime.load(export.build(checkpoint, tmp_path / f"b-{checkpoint.name}", backends=[]), "eager") as model:
            ids.append(model.generate([1, 2, 3], gen_length=16, stop_at_eos=False).sequence)
    assert ids[0] == ids[1]
