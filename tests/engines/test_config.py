"""Plain data of a model: strict reading, and the sizes that follow from others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engines.bundle import Bundle
from engines.config import Capacity, ModelConfig, VisionConfig, strict
from engines.errors import BundleError
from engines.weights import locate
from tests.support.cases import refused

CONFIG = ModelConfig(
    family="f", layers=3, d_model=8, heads=4, kv_heads=2, head_size=2, mlp_size=16, vocab=32, max_length=64,
    rope_theta=1e4, norm_eps=1e-5, qkv_bias=False, bias=False, tied=False, mask_id=31, eos_id=30, eot_id=29,
)  # fmt: skip
VISION = VisionConfig(
    image_size=56, patch_size=14, channels=3, layers=1, width=8, heads=2, mlp_size=16, norm_eps=1e-6, mean=0.5,
    deviation=0.5, resolutions=((56, 112), (112, 112)), max_tiles=2, placeholder="<image>",
)  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, suppressed=(1, 2), vision=VISION)])
def test_there_and_back(config: ModelConfig) -> None:
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json())), "here") == config


def test_unknown_and_missing_keys() -> None:
    raw = CONFIG.to_json()
    for wrong, key in ((raw | {"colour": 1}, "colour"), ({k: v for k, v in raw.items() if k != "bias"}, "bias")):
        with refused(BundleError, "here: unknown or missing keys", f"['{key}']"):
            strict(ModelConfig, wrong, "here")
    vision = replace(CONFIG, vision=VISION).to_json()
    vision["vision"]["colour"] = 1
    with refused(BundleError, "here.vision", "['colour']"):
        ModelConfig.from_json(vision, "here")


@pytest.mark.parametrize(("shift", "rows"), [(0, 2 * 8 + 3 * 2), (1, 3 * 8 + 3 * 2)])
def test_rows_of_a_reuse_pass(shift: int, rows: int) -> None:
    found = Capacity.of(replace(CONFIG, shift=shift), max_length=64, window=8, track_num=2, max_batch=1)
    assert found == Capacity(max_length=64, window=8, track_num=2, max_batch=1, rows=rows)


def test_what_follows_from_sizes(golden_bundle: Path) -> None:
    assert CONFIG.parts == ("embed", "layer_00", "layer_01", "layer_02", "head") and CONFIG.vision_parts == ()
    assert replace(CONFIG, vision=VISION).vision_parts == ("tower", "projector")
    assert (VISION.grid, VISION.patches, VISION.tiles) == (4, 16, 1 + 4)
    assert (CONFIG.eos_ids, CONFIG.end_ids) == ((30,), (30, 29))
    several = replace(CONFIG, more_ends=(28, 27), suppressed=(30,))
    assert (several.eos_ids, several.end_ids) == ((28, 27), (28, 27, 29))
    assert replace(CONFIG, eot_id=30).end_ids == replace(CONFIG, eot_id=None).end_ids == (30,)
    assert replace(CONFIG, suppressed=(29, 30)).end_ids == ()
    bundle = Bundle.open(golden_bundle)
    shapes = [entry.shape for entry in locate(bundle.weights("layer_00")).values()]
    assert bundle.config.layer_numbers == sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
