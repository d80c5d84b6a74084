"""LLaDA-V: its family, its tower and projector on every back end, and merged prompts against published data."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import export
import runtime
from engines import registry as backends
from engines.bundle import STAMPS, Bundle
from engines.config import ModelConfig
from engines.eager import layers as reference
from engines.eager import vision_layers as vision
from engines.errors import CheckpointError, OptionError, PromptError
from engines.model import Model
from engines.signatures.vision import vision_signatures
from engines.vision import Vision, open_vision
from engines.weights import locate
from export.build import estimate, plan
from export.checkpoint.families.llava_llada import FAMILY, SO400M, SYSTEM
from export.checkpoint.reader import Checkpoint, open_checkpoint
from export.checkpoint.registry import find_family
from export.checkpoint.tokenizer import added_tokens
from export.options import BuildOptions
from export.part import Target, write_graph, write_weights
from export.verify import verify
from runtime.images import decode as images
from runtime.images.prompt import encode, encode_image, mention, merge
from runtime.images.tiling import arrange
from runtime.text import Text
from tests.runtime.images.test_decode import CASES, FILES, NEWER, REAL, TINY, close, prompts
from tests.support.cases import refused
from tests.support.fake_gpu import fake_gpu
from tests.support.goldens import DATA

GOLDEN = DATA / "llada-v"
CHECKPOINT = GOLDEN / "llada-v-tiny"
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


def numpy(path: Path) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def stored() -> dict[str, NDArray[Any]]:
    return numpy(GOLDEN / "vision.safetensors")


@pytest.fixture(scope="module")
def language() -> dict[str, NDArray[Any]]:
    return numpy(GOLDEN / "language.safetensors")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.build(CHECKPOINT, tmp_path_factory.mktemp("vision") / "bundle", max_length=512)


@pytest.fixture(scope="module", params=["eager", "onnxruntime"])
def model(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Model]:
    loaded = backends.load(Bundle.open(bundle), request.param, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def runner(model: Model) -> Iterator[Vision]:
    opened = open_vision(model)
    yield opened
    opened.close()


def embedder(checkpoint: Checkpoint) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
    table: NDArray[np.float32] = checkpoint.part("embed")["wte.weight"].float().numpy()
    return lambda ids: table[ids]


# The parts


def test_each_layer_of_the_tower(stored: dict[str, NDArray[Any]]) -> None:
    checkpoint = open_checkpoint(CHECKPOINT)
    config, weights = checkpoint.config.vision, checkpoint.part("tower")
    assert config is not None
    hidden = vision.embed(config, weights, torch.from_numpy(stored["gradient.pixel_values"]))
    for index in range(config.layers + 1):
        close(f"hidden {index}", hidden.numpy(), stored[f"gradient.vision_hidden.{index}"], 1e-4)
        if index < config.layers:
            hidden = vision.layer(config, weights, index, hidden)


@pytest.mark.parametrize("case", CASES)
def test_features_and_rows(case: str, runner: Vision, stored: dict[str, NDArray[Any]]) -> None:
    name, pixels = f"{runner.model.backend} {case}", stored[f"{case}.pixel_values"]
    close(f"{name} features", runner.tower(pixels), stored[f"{case}.vision_features"], 1e-4)
    projected = runner.project(pixels)
    assert projected.dtype == np.float32
    close(f"{name} projected", projected, stored[f"{case}.projected"], 1e-4)
    layout = images.load(TINY, FILES[case]).layout
    close(f"{name} tokens", arrange(layout, projected, runner.newline), stored[f"{case}.image_tokens"], 1e-4)


def test_a_side_that_is_no_multiple_of_a_patch(tmp_path: Path) -> None:
    """As at the published size: what is left over right and below is not seen. A convolution says so, and the graph."""
    checkpoint = open_checkpoint(CHECKPOINT)
    odd = replace(TINY, image_size=59)
    config = replace(checkpoint.config, vision=odd)
    assert odd.grid == TINY.grid and REAL.grid * REAL.patch_size < REAL.image_size
    weights = checkpoint.part("tower")
    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 3, 59, 59)).astype(np.float32))
    kernel = weights["patch.weight"].t().reshape(-1, 3, 14, 14)
    wanted = torch.nn.functional.conv2d(pixels, kernel, weights["patch.bias"], stride=14).flatten(2).mT
    close("patches", vision.embed(odd, weights, pixels).numpy(), (wanted + weights["positions"]).numpy(), 1e-5)
    target = Target(
        folder="onnx", dtype="fp32", precision="fp32", config=config, signatures=vision_signatures(config, "fp32")
    )
    (tmp_path / STAMPS).mkdir()
    write_weights(tmp_path, "tower", [target], weights, "odd")
    write_graph(tmp_path, target, "tower")
    graph = tmp_path / target.graph_file("tower")
    session = ort.InferenceSession(str(graph), session_options(), providers=["CPUExecutionProvider"])
    features = vision.tower(odd, weights, pixels).numpy()
    close("features", session.run(None, {"pixels": pixels.numpy()})[0], features, 1e-4)


def session_options() -> Any:
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    return options


def test_groups_of_tiles_do_not_matter(runner: Vision, stored: dict[str, NDArray[Any]]) -> None:
    pixels = stored["checker.pixel_values"]
    whole = runner.projector(runner.tower(pixels))
    assert len(pixels) % runner.group and len(pixels) > 2 * runner.group
    close("groups", runner.project(pixels), whole, 1e-5)
    assert runner.project(pixels[:0]).shape == (0, *whole.shape[1:])
    assert runner.model.runs["tower"] and runner.model.seconds["projector"] > 0


@pytest.mark.parametrize("case", CASES)
def test_merged_prompts(case: str, runner: Vision, language: dict[str, NDArray[Any]]) -> None:
    """From the image file and the prompt's ids to the rows of the language model."""
    picture = images.load(TINY, FILES[case])
    tokens = encode_image(runner, picture)
    merged = merge(language[f"{case}.input_ids"][0], [tokens], embedder(open_checkpoint(CHECKPOINT)))
    wanted = language[f"{case}.merged_embeds"][0]
    close(f"{runner.model.backend} {case}", merged, wanted, 0.05 if case == "waves" and NEWER else 1e-4)
    golden = prompts()[case]
    assert len(merged) == golden["merged_length"] and len(tokens) == picture.tokens == golden["image_tokens"]


@pytest.mark.parametrize("mode", ["anyres", "pad", "pad_newline"])
def test_two_images(mode: str, runner: Vision, language: dict[str, NDArray[Any]]) -> None:
    names = {"anyres": "two_anyres", "pad": "two_pad_tensor", "pad_newline": "two_pad_list"}
    pictures = [images.load(TINY, FILES[case], mode) for case in ("gradient", "checker")]
    tokens = [encode_image(runner, picture) for picture in pictures]
    merged = merge(language["two_anyres.input_ids"][0], tokens, embedder(open_checkpoint(CHECKPOINT)))
    close(f"{runner.model.backend} {mode}", merged, language[f"{names[mode]}.merged_embeds"][0], 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_prompt_with_an_image(case: str, language: dict[str, NDArray[Any]]) -> None:
    """The language model on merged rows and sixteen masks: whole passes through the reference parts."""
    checkpoint = open_checkpoint(CHECKPOINT)
    config = checkpoint.config
    masks = embedder(checkpoint)(np.full(16, config.mask_id))
    rows = torch.from_numpy(np.concatenate([language[f"{case}.merged_embeds"][0], masks]))[None]
    states, logits = forward(checkpoint, rows)
    if case == "gradient":
        for index, state in enumerate(states[:-1]):
            close(f"hidden {index}", state.numpy(), language[f"gradient.lm_hidden.{index}"], 5e-4)
    whole = f"{case}.logits_step0"
    if whole in language:
        close(whole, logits, language[whole], 5e-4)
    else:
        close(whole, logits[:, -16:], language[f"{whole}_generated"], 5e-4)


def forward(checkpoint: Checkpoint, hidden: torch.Tensor) -> tuple[list[torch.Tensor], NDArray[Any]]:
    config, length = checkpoint.config, hidden.shape[1]
    tables = reference.rotary_tables(length, config.head_size, config.rope_theta)
    states = [hidden]
    for part in config.parts[1:-1]:
        k, v = (torch.zeros(1, config.kv_heads, length, config.head_size) for _ in "kv")
        keys, indices = torch.ones(1, length, dtype=torch.bool), torch.arange(length)[None]
        hidden, _ = reference.layer(config, checkpoint.part(part), tables, hidden, indices, keys, 0, k, v)
        states.append(hidden)
    return states, reference.head(config, checkpoint.part("head"), hidden)[2].numpy()


def test_suppressed_ids_are_neither_predicted_nor_counted(bundle: Path, language: dict[str, NDArray[Any]]) -> None:
    """The head of both back ends: what the published loop does to the logits of masked positions."""
    opened = Bundle.open(bundle)
    checkpoint = open_checkpoint(CHECKPOINT)
    logits = language["gradient.logits_step0"]
    allowed = torch.from_numpy(logits).double()
    allowed[..., list(checkpoint.config.suppressed)] = -torch.inf
    confidence, token = allowed.softmax(-1).max(-1)
    assert checkpoint.config.mask_id not in token
    rows = torch.from_numpy(language["gradient.merged_embeds"][0])
    masks = torch.from_numpy(embedder(checkpoint)(np.full(16, checkpoint.config.mask_id)))
    hidden = forward(checkpoint, torch.cat([rows, masks])[None])[0][-1]
    came = reference.head(checkpoint.config, checkpoint.part("head"), hidden)
    model = backends.load(opened, "onnxruntime", threads=1)
    ids = np.arange(hidden.shape[1])[None]
    found = model.sessions.run("head", ["token", "confidence", "logits"], hidden=hidden.numpy(), rows=ids)  # type: ignore[attr-defined]
    for name, ours in (("eager", [x.numpy() for x in came]), ("onnxruntime", found)):
        assert np.array_equal(ours[0], token.numpy()), name
        close(f"{name} confidence", ours[1], confidence.numpy(), 1e-4)
        close(f"{name} logits", ours[2], logits, 5e-4)
    model.close()


# Prompts


def test_ids_of_a_prompt(bundle: Path) -> None:
    """System message, template, placeholder; with and without the token that the published code loses."""
    opened = Bundle.open(bundle)
    text, config = Text(opened), opened.config
    assert config.vision is not None and config.system == SYSTEM
    for case in CASES:
        golden = prompts()[case]
        turns = [("system", config.system), ("user", mention(golden["question"], config.vision.placeholder, 1))]
        rendered = "<|startoftext|>" + "".join(
            f"<|start_header_id|>{role}<|end_header_id|>\n\n{said}<|eot_id|>" for role, said in turns
        )
        rendered += "<|start_header_id|>assistant<|end_header_id|>\n\n"
        assert rendered == golden["rendered_prompt"]
        ids = encode(rendered, config.vision.placeholder, text.encode, drop=True)
        assert ids.tolist() == golden["input_ids"]
        assert encode(rendered, "<image>", text.encode).tolist() == golden["input_ids_without_the_drop"]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "What is shown?"}]
    wanted = encode(prompts()["text_only"]["rendered_prompt"], "<image>", text.encode)
    assert text.prompt(messages).tolist() == wanted.tolist() and len(wanted) == prompts()["text_only"]["merged_length"]


# The bundle


def test_what_is_built(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    config = opened.config
    assert config == ModelConfig.from_json(json.loads(json.dumps(config.to_json())), "there and back")
    assert config.vision == TINY and config.vision_parts == ("tower", "projector")
    assert [signature.name for signature in vision_signatures(config, "fp32")] == ["tower", "projector"]
    assert {"tower", "projector"} <= set(opened.manifest.parts) & set(opened.engines("onnxruntime")["parts"])
    assert opened.manifest.parts["tower"]["inputs"] == [{"name": "pixels", "dtype": "fp32", "axes": ["N", 3, 56, 56]}]
    assert "newline" in locate(opened.weights("projector"))
    assert not any("post_layernorm" in name for name in locate(opened.weights("tower")))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_verify(precision: str, bundle: Path, tmp_path: Path) -> None:
    if precision != "fp32":
        bundle = export.build(CHECKPOINT, tmp_path / "half", precision=precision, max_length=128, weights="int8")
        sizes = {name: entry.dtype for name, entry in locate(Bundle.open(bundle).weights("tower")).items()}
        assert set(sizes.values()) == {"fp16"}
    rows = {row.part: row for row in verify(Bundle.open(bundle), "onnxruntime", 5e-4 if precision == "fp32" else 0.2)}
    assert all(row.max <= 0.1 * row.scale for part, row in rows.items() if part != "forward")
    for part in ("tower", "projector", "newline"):
        print(f"{precision} {part}: max {rows[part].max:.1e} mean {rows[part].mean:.1e}")
        assert rows[part].max < 1e-4


@pytest.mark.parametrize(("precision", "weights"), [("fp32", None), ("fp16", None), ("fp16", "int8")])
def test_the_estimate_is_near(precision: str, weights: str | None, tmp_path: Path) -> None:
    options = BuildOptions(CHECKPOINT, tmp_path / "b", precision, max_length=64, window=8, max_batch=1, weights=weights)
    job = plan(options)
    export.build(CHECKPOINT, tmp_path / "b", precision, max_length=64, window=8, weights=weights)
    size = sum(p.stat().st_size for kind in ("*.safetensors", "*.data") for p in (tmp_path / "b").rglob(kind))
    print(f"{precision} {weights}: {estimate(job)['disk']} estimated, {size} written")
    assert abs(estimate(job)["disk"] / size - 1) < 0.1


def test_a_text_pays_nothing_for_the_tower(bundle: Path) -> None:
    with runtime.load(bundle, "onnxruntime", threads=1) as loaded:
        assert "tower" not in loaded.model.sessions  # type: ignore[attr-defined]
        assert loaded.generate([3, 1, 4], gen_length=8).steps > 0


def test_a_model_without_a_tower(golden: runtime.Runtime) -> None:
    with refused(OptionError, "without a vision tower", "leave the image out"):
        open_vision(golden.model)
    assert golden.bundle.config.vision_parts == () and vision_signatures(golden.bundle.config, "fp32") == ()


def test_the_tower_counts_as_an_option(bundle: Path, tmp_path: Path) -> None:
    """The bundle of a checkpoint whose tower has other numbers is another one."""
    folder = copied(tmp_path)
    built = export.build(folder, tmp_path / "bundle", backends=[], max_length=64)
    assert export.build(folder, built, backends=[], max_length=64) == built
    tower = tmp_path / "siglip-tiny-patch14-56/config.json"
    tower.write_text(json.dumps(json.loads(tower.read_text()) | {"num_attention_heads": 2}))
    with pytest.raises(Exception, match="other options"):
        export.build(folder, built, backends=[], max_length=64)
    again = export.build(folder, built, backends=[], max_length=64, force=True)
    found = Bundle.open(again).config.vision
    assert found is not None and found.heads == 2


# TensorRT


def test_on_the_stand_in(tmp_path: Path, stored: dict[str, NDArray[Any]]) -> None:
    """Ports, memory and groups of the runner; the numbers are ONNX Runtime's. It has not run on a GPU."""
    with fake_gpu():
        built = Bundle.open(export.build(CHECKPOINT, tmp_path / "b", backends=["tensorrt"], max_length=64, window=8))
        model = backends.load(built, "tensorrt")
        runner = open_vision(model)
        for case in CASES:
            close(case, runner.project(stored[f"{case}.pixel_values"]), stored[f"{case}.projected"], 1e-4)
        assert np.array_equal(runner.newline, stored["gradient.image_tokens"][-1])
        held = len(model.cuda.owned)  # type: ignore[attr-defined]
        runner.close()
        assert len(model.cuda.owned) < held  # type: ignore[attr-defined]
        runner.close()
        model.close()
        assert {"tower", "projector"} <= {row.part for row in verify(built, "tensorrt", 5e-4)}


def test_it_builds_for_tensorrt(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx, which builds without a GPU, is not installed")
    built = export.build(
        CHECKPOINT, tmp_path / "rtx", precision="fp16", backends=["tensorrt"], max_length=256, window=8,
        flavour="tensorrt_rtx", capabilities=["8.9"],
    )  # fmt: skip
    entry = Bundle.open(built).engines("tensorrt")
    for part in ("tower", "projector"):
        assert entry["profiles"][part] == [{"N": [1, 7, 37]}]
        assert len(set(entry["parts"][part]["plans"].values())) == 1, "one plan, whatever the length"
    assert entry["parts"]["tower"]["layers"]["ATTENTION_INPUT"] == 2, "one for each layer, and whole"
    assert Bundle.open(built).file(entry["parts"]["tower"]["weights"]).name == "tower.safetensors"


# The family


def copied(tmp_path: Path, **changes: Any) -> Path:
    """The golden checkpoint and its tower's config, to be changed."""
    shutil.copytree(GOLDEN / "siglip-tiny-patch14-56", tmp_path / "siglip-tiny-patch14-56")
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "llada-v-tiny"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder


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
    folder = copied(tmp_path)
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
    assert ids["mask"] in {token["id"] for token in added_tokens(CHECKPOINT / "tokenizer_config.json")}
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
    folder = copied(tmp_path)
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


def test_an_image_and_no_place_for_it() -> None:
    with refused(PromptError, "0 placeholders", "1 images"):
        merge(np.array([1, 2]), [np.zeros((3, 4), np.float32)], lambda ids: np.zeros((len(ids), 4), np.float32))
