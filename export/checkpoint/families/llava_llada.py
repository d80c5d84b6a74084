"""The family LLaDA-V, in the published layout of GSAI-ML/LLaDA-V (arXiv 2505.16933).

LLaDA's transformer, with tensor names as in Llama, after a SigLIP tower and a
projector of two layers. Its config.json has neither the id of the mask, which is
in the tokenizer, nor the numbers of the tower, which are in the tower's own
config.json in or beside the checkpoint. The weights of the tower are those in
the checkpoint, because training changed them.
"""

import json
import re
from pathlib import Path, PurePath
from typing import Any

from engines.config import ModelConfig, VisionConfig
from engines.errors import CheckpointError
from export.checkpoint import Family, Weight, llama
from export.checkpoint.config_keys import Keys, expect
from export.checkpoint.files import AGAIN
from export.checkpoint.tokenizer import token_ids

REQUIRED = (
    "mm_hidden_size", "mm_vision_tower", "mm_projector_type", "mm_patch_merge_type", "mm_vision_select_layer",
    "image_aspect_ratio", "image_grid_pinpoints",
)  # fmt: skip
ADDED = ("mask_token_id", "suppressed_ids", "vision_config")  # by `complete`
FIXED: dict[str, Any] = {
    "hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad", "mm_newline_position": "grid", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
    "mm_resampler_type": None, "image_crop_resolution": None, "image_split_resolution": None, "use_mm_proj": True,
}  # fmt: skip
HARMLESS = frozenset((  # keys of training and videos
    "add_faster_video", "add_time_instruction", "faster_token_stride", "force_sample", "mm_spatial_pool_stride",
    "mm_spatial_pool_mode", "mm_projector_lr", "mm_vision_tower_lr", "mm_tunable_parts", "freeze_mm_mlp_adapter",
    "tune_mm_mlp_adapter", "unfreeze_mm_vision_tower", "freeze_mm_vision_resampler", "tune_mm_vision_resampler",
    "tokenizer_model_max_length", "tokenizer_padding_side", "vision_tower_pretrained", "use_pos_skipping",
    "pos_skipping_range",
))  # fmt: skip

TOWER_REQUIRED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
)  # fmt: skip
TOWER_FIXED: dict[str, Any] = {
    "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
TOWER_HARMLESS = frozenset(("vision_use_head",))
SO400M = {  # numbers of the published tower, constants of the published code
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip

MASK = "<|mdm_mask|>"
SUPPRESSED = ("<|endoftext|>", "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>")
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def complete(directory: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The keys of config.json and the `ADDED` ones; raises CheckpointError where the directory lacks their sources."""
    known = token_ids(directory)
    ids = {text: known.get(text) for text in (MASK, *SUPPRESSED)}
    for text, number in ids.items():
        if number is None:
            raise CheckpointError(
                f"{directory}: no tokenizer there has the token {text}, and config.json does not have its id; "
                "download tokenizer.json and tokenizer_config.json beside it"
            )
    agree = raw.get("mask_token_id") in (None, ids[MASK])
    expect(agree, "mask_token_id", raw.get("mask_token_id"), f"{ids[MASK]}, as the tokenizer has {MASK}")
    added = {"mask_token_id": ids[MASK], "suppressed_ids": [ids[text] for text in SUPPRESSED]}
    return raw | added | {"vision_config": tower_config(directory, raw.get("mm_vision_tower"))}


def tower_config(directory: Path, name: Any) -> dict[str, Any] | None:
    """The keys of the tower's config.json, or of the published tower; None without a name."""
    if name is None:
        return None
    expect(isinstance(name, str) and PurePath(name).name != "", "mm_vision_tower", name, "the name of a tower")
    last = PurePath(name).name
    for folder in (directory / last, directory.resolve().parent / last):
        path = folder / "config.json"
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                # A config of a tower and a text model together has the tower's keys one level down.
                found: dict[str, Any] = content["vision_config"] if content.get("model_type") == "siglip" else content
                return dict(found)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(f"{path} is no config of a vision tower ({error}); {AGAIN}") from error
    if last.endswith("so400m-patch14-384"):
        return dict(SO400M)
    raise CheckpointError(
        f"config.json: mm_vision_tower is {json.dumps(name)}, whose numbers are not known; "
        f"put the tower's config.json into {directory / last}"
    )


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a completed config.json; raises CheckpointError naming the key that is wrong."""
    required = dict.fromkeys((*llama.REQUIRED, *REQUIRED, *ADDED))
    keys = Keys("llada-v", raw, required, llama.OPTIONAL, FIXED, HARMLESS)
    found, suppressed = llama.numbers(keys), keys.values["suppressed_ids"]
    vocab, ends = found["vocab"], (found["eos_id"], *found["more_ends"])
    expect(max(suppressed) < vocab, "vocab_size", vocab, f"more than the tokenizer's ids ({max(suppressed)})")
    agree = suppressed[0] in ends
    expect(agree, "eos_token_id", found["eos_id"], f"{suppressed[0]}, as the tokenizer has {SUPPRESSED[0]}")
    return ModelConfig(
        family="llada-v", **found, qkv_bias=False, bias=False, suppressed=tuple(suppressed), system=SYSTEM,
        vision=read_vision(keys),
    )  # fmt: skip


def read_vision(keys: Keys) -> VisionConfig:
    """The `VisionConfig`: the tower's numbers and how images are cut into tiles for it."""
    try:
        tower = Keys("siglip", keys.values["vision_config"], TOWER_REQUIRED, (), TOWER_FIXED, TOWER_HARMLESS)
        width, heads = tower.count("hidden_size"), tower.count("num_attention_heads")
        expect(width % heads == 0, "hidden_size", width, f"a multiple of num_attention_heads ({heads})")
        side, patch = tower.count("image_size"), tower.count("patch_size")
        expect(side >= patch, "patch_size", patch, f"at most image_size ({side})")
        layers = tower.count("num_hidden_layers")
        expect(layers > 1, "num_hidden_layers", layers, "2 or more, as the last is not run")
        mlp_size = tower.count("intermediate_size")
    except CheckpointError as error:
        raise CheckpointError(f"the vision tower's {error}") from error
    expect(
        keys.count("mm_hidden_size") == width, "mm_hidden_size", keys.values["mm_hidden_size"], f"the tower's {width}"
    )
    ratio = str(keys.values["image_aspect_ratio"])
    cap = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", ratio)
    expect(cap is not None, "image_aspect_ratio", keys.values["image_aspect_ratio"], "anyres_max_N")
    assert cap is not None
    pinpoints = keys.values["image_grid_pinpoints"]
    fine = isinstance(pinpoints, list) and pinpoints and all(_resolution(pair, side) for pair in pinpoints)
    expect(bool(fine), "image_grid_pinpoints", pinpoints, f"a list of [width, height], each a multiple of {side}")
    return VisionConfig(
        image_size=side, patch_size=patch, channels=3, layers=layers - 1, width=width, heads=heads, mlp_size=mlp_size,
        norm_eps=TOWER_FIXED["layer_norm_eps"], mean=0.5, deviation=0.5,
        resolutions=tuple((width, height) for width, height in pinpoints), max_tiles=int(cap[1]),
        placeholder="<image>",
    )  # fmt: skip


def _resolution(pair: Any, side: int) -> bool:
    numbers = isinstance(pair, list) and [type(number) for number in pair] == [int, int]
    return numbers and all(number > 0 and number % side == 0 for number in pair)


def weights(config: ModelConfig, part: str) -> dict[str, Weight]:
    """Local name -> tensor, for the part `part` of `config.parts` or `config.vision_parts`."""
    if part not in config.vision_parts:
        return llama.weights(config, part)
    vision = config.vision
    assert vision is not None
    d, width, tower = config.d_model, vision.width, "model.vision_tower.vision_tower.vision_model"
    if part == "projector":
        return {
            **_linear("fc1", "model.mm_projector.0", d, width),
            **_linear("fc2", "model.mm_projector.2", d, d),
            "newline": Weight("model.image_newline", (d,), False),
        }
    patch = f"{tower}.embeddings.patch_embedding"
    kernel = width, vision.channels, vision.patch_size, vision.patch_size
    places = Weight(f"{tower}.embeddings.position_embedding.weight", (vision.patches, width), False)
    found = {
        "patch.weight": Weight(f"{patch}.weight", kernel, True),
        "patch.bias": Weight(f"{patch}.bias", (width,), False),
        "positions": places,
    }
    for index in range(vision.layers):
        here, layer = f"layer_{index:02d}", f"{tower}.encoder.layers.{index}"
        for name in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                stored = f"{layer}.layer_{name}.{kind}"
                found[f"{here}.{name}.{kind}"] = Weight(stored, (width,), False)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= _linear(f"{here}.{name}", f"{layer}.self_attn.{name}", width, width)
        found |= _linear(f"{here}.fc1", f"{layer}.mlp.fc1", vision.mlp_size, width)
        found |= _linear(f"{here}.fc2", f"{layer}.mlp.fc2", width, vision.mlp_size)
    return found


def _linear(local: str, tensor: str, rows: int, columns: int) -> dict[str, Weight]:
    matrix, bias = Weight(f"{tensor}.weight", (rows, columns), True), Weight(f"{tensor}.bias", (rows,), False)
    return {f"{local}.weight": matrix, f"{local}.bias": bias}


FAMILY = Family(
    name="llada-v",
    model_type="llava_llada",
    architectures=("LlavaLLaDAModelLM",),
    read_config=read_config,
    weights=weights,
    published=("GSAI-ML/LLaDA-V",),
    ignorable=("*.rotary_emb.inv_freq", "*.vision_model.post_layernorm.*", "*.embeddings.position_ids"),
    end_of_turn="<|eot_id|>",
    mask=MASK,
    complete=complete,
)
