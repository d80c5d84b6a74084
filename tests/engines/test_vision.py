"""The vision parts on the CPU's back ends and the prompts made from them, against published data; their bundles."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

import export
import runtime
from engines import registry as backends
from engines.bundle import STAMPS, Bundle
from engines.config import ModelConfig
from engines.eager import layers as reference
from engines.eager import vision_layers as vision
from engines.errors import OptionError, PromptError
from engines.model import Model
from engines.signatures.vision import vision_signatures
from engines.vision import Vision, open_vision
from engines.weights import locate
from export.checkpoint.families.llava_llada import SYSTEM
from export.checkpoint.reader import Checkpoint, open_checkpoint
from export.part import Target, write_graph, write_weights
from export.verify import verify
from runtime.images import decode as images
from runtime.images.prompt import encode, encode_image, mention, merge
from runtime.images.tiling import arrange
from runtime.text import Text
from tests.support.cases import refused
from tests.support.vision import CASES, CHECKPOINT, FILES, GOLDEN, NEWER, REAL, TINY, close, copy_checkpoint, prompts


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
    """The language model on merged rows and sixteen masks: full passes through the reference parts."""
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
            f"<|start_header_id|>{role}<|end_header_id|>\n\n{text_of}<|eot_id|>" for role, text_of in turns
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


@pytest.mark.slow
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


def test_a_text_pays_nothing_for_the_tower(bundle: Path) -> None:
    with runtime.load(bundle, "onnxruntime", threads=1) as loaded:
        assert "tower" not in loaded.model.sessions  # type: ignore[attr-defined]
        assert loaded.generate([3, 1, 4], gen_length=8).steps > 0


def test_a_model_without_a_tower(golden: runtime.Runtime) -> None:
    with refused(OptionError, "without a vision tower", "leave the image out"):
        open_vision(golden.model)
    assert golden.bundle.config.vision_parts == () and vision_signatures(golden.bundle.config, "fp32") == ()


@pytest.mark.slow
def test_the_tower_counts_as_an_option(bundle: Path, tmp_path: Path) -> None:
    """The bundle of a checkpoint whose tower has other numbers is another one."""
    folder = copy_checkpoint(tmp_path)
    built = export.build(folder, tmp_path / "bundle", backends=[], max_length=64)
    assert export.build(folder, built, backends=[], max_length=64) == built
    tower = tmp_path / "siglip-tiny-patch14-56/config.json"
    tower.write_text(json.dumps(json.loads(tower.read_text()) | {"num_attention_heads": 2}))
    with pytest.raises(Exception, match="other options"):
        export.build(folder, built, backends=[], max_length=64)
    again = export.build(folder, built, backends=[], max_length=64, force=True)
    found = Bundle.open(again).config.vision
    assert found is not None and found.heads == 2


def test_an_image_and_no_place_for_it() -> None:
    with refused(PromptError, "0 placeholders", "1 images"):
        merge(np.array([1, 2]), [np.zeros((3, 4), np.float32)], lambda ids: np.zeros((len(ids), 4), np.float32))
