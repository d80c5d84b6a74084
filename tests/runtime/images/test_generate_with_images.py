"""From image and prompt to the answer: published generations, every policy, the command line."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import export
import runtime
from engines.errors import BackendError, OptionError, PromptError
from runtime.chat import Chat
from runtime.cli import main
from runtime.decoding.generate import Output
from runtime.decoding.policies import FULL_ATTENTION
from runtime.images.prompt import IMAGE, placeholder_ids
from tests.support.cases import ROOT, refused
from tests.support.comparison import BACKENDS, NOISE, difference, recorded
from tests.support.vision import CASES, CHECKPOINT, FILES, GOLDEN, NEWER, prompts

PROMPTS = prompts()
LAYOUTS = {"auto": "pad_tensor", "pad": "pad_tensor", "tile": "anyres"}  # and the published prompt of two images


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.build(CHECKPOINT, tmp_path_factory.mktemp("images") / "bundle", max_length=512, window=16)


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(bundle, request.param, threads=1) as loaded:
        yield loaded


def published(case: str) -> tuple[list[int], list[Path]]:
    """The ids and images of a published prompt."""
    name, _, variant = case.partition("_")
    if case == "text_only":
        return PROMPTS[case]["input_ids"], []
    if name == "two":
        return PROMPTS[case]["input_ids"], [FILES["gradient"], FILES["checker"]]
    key = "input_ids_without_the_drop" if variant == "without_drop" else "input_ids"
    return PROMPTS[name][key], [FILES[name]]


def trajectories() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((GOLDEN / "trajectories.json").read_text())["trajectories"]
    return found


@pytest.mark.slow
def test_published_generations(model: runtime.Runtime) -> None:
    """Token for token from the image's file on: schedules, guidance, ends, two images, text alone."""
    for golden in trajectories():
        args = golden["args"]
        ids, images = published(golden["prompt"])
        ends = [token for (token,) in args.get("stopping_criteria_token_ids", [])]
        out = model.generate(
            ids, "full", images, gen_length=args["gen_length"], block_length=args["block_length"],
            steps=min(args["steps"], args["gen_length"]), cfg_scale=args.get("cfg_scale", 0.0),
            stop_at_eos=bool(ends), eos_id=ends or None, image_layout="tile",
        )  # fmt: skip
        start = golden["prompt_length"]
        assert len(out.sequence) - args["gen_length"] == start
        for event, step in zip(out.trace, golden["steps"], strict=True):
            came = dict(zip((p - start for p in event.committed), event.tokens, strict=True))
            wanted = dict(zip(step["positions"], step["tokens"], strict=True))
            assert came == wanted, f"generation {golden['id']}, step {event.step}"
        assert out.sequence[start:][: len(golden["output_ids"])] == golden["output_ids"]
    assert len(trajectories()) == 16
    print(f"{model.backend}: 16 generations")


def test_golden_logits(model: runtime.Runtime) -> None:
    """One forward over the merged prompt and 16 masks, as a runner runs it."""
    stored = load_file(GOLDEN / "language.safetensors")
    for case in CASES:
        ids, images = published(case)
        request = model.request(ids, images, {"image_layout": "tile"})
        row = np.concatenate([request.prompt_ids, np.full(16, 500)])
        with model.model.exclusive():
            runner = model.model.new_runner(len(row))
            runner.set_input_embeddings(request.embeddings)
            runner.embed(row)
            runner.run_layers(len(row), None)
            whole = f"{case}.logits_step0" in stored
            wanted = stored[f"{case}.logits_step0" + ("" if whole else "_generated")][0]
            gap = np.abs(runner.logits(np.arange(len(row) - len(wanted), len(row))) - wanted)
        print(f"{model.backend} {case}: max {gap.max():.2e} mean {gap.mean():.2e}")
        assert gap.max() < (1.0 if NEWER and case == "waves" else 5e-4), "a newer Pillow resizes it otherwise"


@pytest.mark.parametrize("case", list(CASES))
def test_a_question_becomes_the_published_prompt(model: runtime.Runtime, case: str) -> None:
    """The model's own system message, the template, the image in front of the question."""
    golden = PROMPTS[case]
    question = golden["question"].removeprefix("<image>\n")
    assert model.text.render(golden["question"]) == golden["rendered_prompt"]
    request = model.request(question, [FILES[case]], {})
    wanted = placeholder_ids(np.array(golden["input_ids_without_the_drop"]), [request.embeddings], 512)
    assert request.prompt_ids.tolist() == wanted.tolist()
    assert len(request.embeddings) == golden["image_tokens"] and request.image_seconds > 0
    said = model.generate(question, images=[FILES[case]], gen_length=8)
    assert (
        said.sequence
        == model.generate(golden["input_ids_without_the_drop"], images=[FILES[case]], gen_length=8).sequence
    )


@pytest.mark.slow
@pytest.mark.parametrize("policy", FULL_ATTENTION)
def test_back_ends_agree_on_every_policy(bundle: Path, policy: str) -> None:
    """The image's tokens are cached, tracked and refreshed as the prompt's."""
    ids, images = published("two_anyres")
    runs = []
    for backend in BACKENDS:
        with runtime.load(bundle, backend, threads=1) as loaded:
            options: dict[str, Any] = {"gamma": 0.999} if policy == "elastic" else {}
            options["image_layout"] = "tile"
            runs.append(loaded.generate(ids, policy, images, gen_length=24, **options))
    if min(event.margin for run in runs for event in run.trace) > NOISE:
        assert difference(*map(recorded, runs)) is None
    tracked = {position for event in runs[0].trace for position in event.tracked}
    assert policy != "elastic" or any(runs[0].sequence[position] >= 512 for position in tracked), "an image's token"


@pytest.mark.slow
def test_elastic_against_full(model: runtime.Runtime) -> None:
    """The same code path; random weights agree by chance, so tokens are reported and not judged."""
    for case in CASES:
        ids, images = published(case)
        full = model.generate(ids, "full", images, gen_length=32, threshold=0.9, block_length=32)
        elastic = model.generate(ids, "elastic", images, gen_length=32, window=16)
        equal = np.mean(np.array(full.sequence[-32:]) == np.array(elastic.sequence[-32:]))
        print(
            f"{model.backend} {case}: {equal:.0%} of tokens, {elastic.computed_fraction:.0%} of layer-rows, "
            f"{elastic.steps} steps"
        )
        assert elastic.computed_fraction < full.computed_fraction == 1 and elastic.tokens > 0


def test_suppressed_tokens_are_never_decoded(model: runtime.Runtime) -> None:
    ids, images = published("waves")
    for policy, options in (
        ("elastic", {}),
        ("full", {"cfg_scale": 1.5}),
        ("timesteps", {"temperature": 3.0, "seed": 1}),
    ):
        out = model.generate(ids, policy, images, gen_length=32, stop_at_eos=False, **options)
        assert not {480, 481, 500, 507, 508} & set(out.sequence[-32:])
    assert model.bundle.config.end_ids == (model.bundle.config.eot_id,) == (509,), "the end of a turn ends an answer"


def test_images_in_a_conversation(model: runtime.Runtime) -> None:
    """Placeholders of earlier turns keep their images in order."""
    turns = [
        {"role": "user", "content": "<image>\nFirst?"}, {"role": "assistant", "content": "A"},
        {"role": "user", "content": "And this?"},
    ]  # fmt: skip
    request = model.request(turns, [FILES["gradient"], FILES["checker"]], {"image_layout": "tile"})
    runs = np.flatnonzero(request.prompt_ids >= 512)
    assert len(runs) == 88 + 81 == len(request.embeddings) and np.diff(runs).max() > 1
    with refused(PromptError, "has <image> 1 times", "2 images", "leave it out"):
        model.request("<image> What?", [FILES["gradient"], FILES["checker"]], {})
    with refused(PromptError, "id 512", "vocabulary of 512"):
        model.request([512, IMAGE], [FILES["waves"]], {})
    with refused(PromptError, "integers", "float64"):
        model.generate([1.0, float(IMAGE)], images=[FILES["waves"]], gen_length=4)
    with refused(PromptError, "1 placeholders for 2 images"):
        model.request([1, IMAGE, 2], [FILES["gradient"], FILES["checker"]], {})


def test_several_images_are_padded_as_published(model: runtime.Runtime) -> None:
    """One tile each where several come, the grid for one, and what is asked for otherwise."""
    ids, images = published("two_anyres")
    lengths = {
        layout: len(model.request(ids, images, {"image_layout": layout}).prompt_ids)
        for layout in ("auto", "tile", "pad")
    }
    merged = {layout: PROMPTS[f"two_{case}"]["merged_length"] for layout, case in LAYOUTS.items()}
    assert lengths == merged and lengths["pad"] < lengths["tile"]
    one, images = published("gradient")
    assert len(model.request(one, images, {}).embeddings) == PROMPTS["gradient"]["image_tokens"]
    assert len(model.request(one, images, {"image_layout": "pad"}).embeddings) == PROMPTS["gradient"]["base_tokens"]
    with refused(OptionError, "image_layout", "auto, tile, pad", "'grid'"):
        model.generate(one, images=images, image_layout="grid", gen_length=4)


def test_a_chat_about_images(model: runtime.Runtime) -> None:
    """An image belongs to the next message and stays with its turn; it is encoded once."""
    chat = Chat(model, options={"gen_length": 8})
    chat.attach(FILES["gradient"])
    *_, first = chat.say("What is shown?")
    asked = model.generate("What is shown?", images=[FILES["gradient"]], gen_length=8)
    assert isinstance(first, Output) and first.sequence == asked.sequence
    chat.attach(FILES["checker"])
    *_, second = chat.say("And here?")
    assert isinstance(second, Output)
    assert [len(images) for images in chat.images] == [1, 1] and chat.waiting == []
    placed = {token for token in second.sequence if token >= 512}
    assert placed == set(range(512, 512 + 88 + 81)) and chat.turns[1][0] == "<image>\nAnd here?"
    chat.reset()
    assert chat.images == []
    with refused(PromptError, "no image", "check its path"):
        chat.attach("nothing.png")


def test_a_chat_in_a_pipe(bundle: Path) -> None:
    said = f"/image {FILES['waves']}\nWhat?\n/image nothing.png\n/stats now\n/stats\n"
    command = [sys.executable, "-m", "runtime", "chat", str(bundle), "--gen-length", "8", "--threads", "1"]
    done = subprocess.run(command, input=said, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 turn" in done.stdout.splitlines()[-1]
    assert "no image nothing.png" in done.stderr and "unknown command /stats now" in done.stderr


def test_the_command(bundle: Path, text_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", str(bundle), "--prompt", "What is shown?", "--gen-length", "8", "--threads", "1"]
    assert main([*argv, "--image", str(FILES["gradient"]), "--image", str(FILES["checker"]), "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["tokens"] >= 0 and line["image_seconds"] > 0
    assert main([*argv, "--image-layout", "pad"]) == 2 and "has no effect without an image" in capsys.readouterr().err
    assert main([*argv, "--image", str(FILES["gradient"])]) == 0 and "s for the images" in capsys.readouterr().out
    for bad, words in (
        ("nothing.png", ("no image nothing.png", "check its path")),
        (__file__, ("is not a readable image", "PNG")),
    ):
        assert main([*argv, "--image", bad]) != 0
        said = capsys.readouterr().err
        assert all(word in said for word in words) and "Traceback" not in said, said
    blind = ["generate", str(text_bundle), "--prompt", "Hi", "--image", str(FILES["gradient"]), "--threads", "1"]
    assert main(blind) != 0 and "without a vision tower" in capsys.readouterr().err


def test_in_python(bundle: Path, golden: runtime.Runtime) -> None:
    """Bytes and Pillow images give the same answer as files."""
    from PIL import Image

    with runtime.load(bundle, "onnxruntime", threads=1) as loaded, Image.open(FILES["waves"]) as opened:
        outs = [
            loaded.generate("What?", images=[image], gen_length=8)
            for image in (FILES["waves"], str(FILES["waves"]), FILES["waves"].read_bytes(), opened)
        ]
        assert all(isinstance(out, Output) and out.sequence == outs[0].sequence for out in outs)
    with refused(OptionError, "without a vision tower", "leave the image out"):
        golden.generate([1, IMAGE], images=[FILES["waves"]], gen_length=4)
    with refused(OptionError, "images are a list"):
        golden.generate([1, IMAGE], images="a.png", gen_length=4)
    with refused(BackendError, "closed"):
        loaded.encode_images([FILES["waves"]])
