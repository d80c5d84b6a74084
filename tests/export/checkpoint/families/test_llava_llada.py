"""The family of LLaDA-V: published and golden configs, tokens and tensors, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from engines.config import ModelConfig
from engines.errors import CheckpointError
from export.checkpoint.families.llava_llada import FAMILY, SO400M
from export.checkpoint.reader import open_checkpoint
from export.checkpoint.registry import find_family
from export.checkpoint.tokenizer import token_ids
from tests.support.cases import refused
from tests.support.vision import CHECKPOINT, GOLDEN, REAL, copy_checkpoint

IDS = {  # of the published tokenizer
    "<|startoftext|>": 126080, "<|endoftext|>": 126081, "<|mdm_mask|>": 126336, "<|start_header_id|>": 126346,
    "<|end_header_id|>": 126347, "<|eot_id|>": 126348,
}  # fmt: skip
PUBLISHED = {
    "architectures": ["LlavaLLaDAModelLM"], "model_type": "llava_llada", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 126081, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 16384, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": False, "vocab_size": 126464, "image_aspect_ratio": "anyres_max_4",
    "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
    "mm_hidden_size": 1152, "mm_newline_position": "grid", "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "use_mm_proj": True,
    "mm_vision_tower": "google/siglip2-so400m-patch14-384",
}  # fmt: skip


def described(tmp_path: Path, **changes: Any) -> ModelConfig:
    """What the published config.json with `changes` says, beside the published tokenizer's ids."""
    added = {str(number): {"content": text} for text, number in IDS.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    raw = PUBLISHED | changes
    return find_family(raw).read_config(FAMILY.complete(tmp_path, raw))


def test_a_published_config(tmp_path: Path) -> None:
    config = described(tmp_path)
    assert (config.family, config.layers, config.d_model, config.head_size) == ("llada-v", 32, 4096, 128)
    assert (config.mask_id, config.eos_id, config.suppressed) == (126336, 126081, (126081, 126080, 126346, 126347))
    tower = config.vision
    assert tower is not None and (tower.layers, tower.width, tower.mlp_size, tower.heads) == (26, 1152, 4304, 16)
    assert (tower.patches, tower.tiles, tower.max_tiles, tower.resolutions) == (729, 37, 4, REAL.resolutions)
    shapes = {name: weight.shape for name, weight in FAMILY.weights(config, "tower").items()}
    assert shapes["patch.weight"] == (1152, 3, 14, 14) and shapes["positions"] == (729, 1152)
    assert shapes["layer_25.fc2.weight"] == (1152, 4304) and "layer_26.fc1.weight" not in shapes


def test_the_tower_beside_the_checkpoint(tmp_path: Path) -> None:
    """Its own config.json comes first, also where it lies in that of a model of two towers."""
    folder = tmp_path / "siglip2-so400m-patch14-384"
    folder.mkdir()
    nested = {"model_type": "siglip", "text_config": {}, "vision_config": SO400M | {"num_attention_heads": 8}}
    (folder / "config.json").write_text(json.dumps(nested))
    tower = described(tmp_path).vision
    assert tower is not None and tower.heads == 8
    (folder / "config.json").write_text(json.dumps(SO400M | {"hidden_act": "gelu"}))
    with refused(CheckpointError, "the vision tower's config.json", "hidden_act", '"gelu_pytorch_tanh"'):
        described(tmp_path)
    for content in ("no JSON", '{"model_type": "siglip"}', "[1]"):
        (folder / "config.json").write_text(content)
        with refused(CheckpointError, str(folder / "config.json"), "no config of a vision tower"):
            described(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"hidden_act": "gelu"}, ("hidden_act", '"gelu"', '"silu"')), ({"attention_bias": True}, ("attention_bias",)),
     ({"mm_vision_tower": "openai/clip-vit"}, ("mm_vision_tower", "clip-vit", "put the tower's config.json into")),
     ({"mm_vision_tower": None}, ("mm_vision_tower", "missing")), ({"mm_vision_tower": 3}, ("is 3", "name of a tower")),
     ({"mm_hidden_size": 1024}, ("mm_hidden_size", "1024", "1152")), ({"colour": 1}, ("llada-v", "colour = 1")),
     ({"mm_projector_type": "linear"}, ("mm_projector_type", "mlp2x_gelu")), ({"hidden_size": 100}, ("per head",)),
     ({"mm_vision_select_layer": -1}, ("mm_vision_select_layer", "-2")),
     ({"mm_patch_merge_type": "flat"}, ("mm_patch_merge_type", "spatial_unpad")),
     ({"mm_use_im_start_end": True}, ("mm_use_im_start_end", "false")),
     ({"mm_newline_position": "frame"}, ("mm_newline_position", "grid")),
     ({"image_aspect_ratio": "pad"}, ("image_aspect_ratio", "anyres_max_N")),
     ({"image_aspect_ratio": "anyres_max_0"}, ("image_aspect_ratio", "anyres_max_N")),
     ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, ("image_grid_pinpoints", "[width, height]", "384")),
     ({"image_grid_pinpoints": [[384, 385]]}, ("image_grid_pinpoints", "multiple of 384")),
     ({"image_grid_pinpoints": []}, ("image_grid_pinpoints", "a list")),
     ({"mask_token_id": 7}, ("mask_token_id is 7", "126336", "<|mdm_mask|>")),
     ({"eos_token_id": 7}, ("eos_token_id is 7", "126081", "<|endoftext|>")),
     ({"vocab_size": 126340}, ("vocab_size", "126347")), ({"num_key_value_heads": 5}, ("divisor",))],
)  # fmt: skip
def test_configs_that_are_refused(change: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    with refused(CheckpointError, *words):
        described(tmp_path, **change)


def test_no_tokenizer(tmp_path: Path) -> None:
    """Ids are read, not guessed: not even the published ones."""
    folder = copy_checkpoint(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with refused(CheckpointError, "<|mdm_mask|>", "config.json does not have its id", "download tokenizer.json"):
        open_checkpoint(folder)


def test_the_tokens_of_the_golden_checkpoint() -> None:
    config = open_checkpoint(CHECKPOINT).config
    tiny = json.loads((GOLDEN / "prompts.json").read_text())
    ids = tiny["tiny_ids"]
    assert (config.mask_id, config.eos_id, config.eot_id) == (ids["mask"], ids["eos"], ids["eot"])
    assert set(config.suppressed) == set(tiny["suppressed_ids_tiny"])
    assert ids["mask"] in token_ids(CHECKPOINT).values()
    assert Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).token_to_id("<|mdm_mask|>") == ids["mask"]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [("model.image_newline", None, ("lacks model.image_newline [64]", "projector")),
     ("model.mm_projector.0.weight", lambda t: t[:, :40], ("mm_projector.0.weight", "[64, 40]", "[64, 48]")),
     ("model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias", None, ("layers.1", "tower")),
     ("model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight", lambda t: t[:9],
      ("position_embedding", "[9, 48]", "[16, 48]"))],
)  # fmt: skip
def test_tensors_that_are_refused(name: str, change: Any, words: tuple[str, ...], tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    if change is None:
        del tensors[name], index["weight_map"][name]
    else:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(CheckpointError, *words):
        open_checkpoint(folder)
