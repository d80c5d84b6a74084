"""Canvases in text: how they are written, what typed holes take, what comes back, and editing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from engines.errors import OptionError, PromptError
from runtime.canvas import Field, escaped, parts
from runtime.cli import main
from tests.support.cases import refused
from tests.support.commands import Call, failed

SKELETON = (
    '{"name": "{{name:6:string}}", "age": {{age:3:integer}}, "ok": {{ok:choice:true|false}}, "n": [{{n:1:integer}}]}'
)


@pytest.fixture(scope="module")
def writer(text_bundle: Path) -> Iterator[runtime.Runtime]:
    """Random weights with a byte-level tokenizer."""
    with runtime.load(text_bundle, "onnxruntime", threads=1) as model:
        yield model


def test_how_a_canvas_is_written() -> None:
    assert parts("a {{x:2}} b {{y:3:integer}}{{z:choice:ja|nein}}") == [
        "a ", Field("x", 2), " b ", Field("y", 3, "integer"), "", Field("z", 0, "choice", ("ja", "nein")), "",
    ]  # fmt: skip
    assert parts('{"a": {"b": {{n:1}}}}') == ['{"a": {"b": ', Field("n", 1), "}}"], "single braces are text"
    assert parts("{{{{x:2}} {{y:2}}") == ["{{x:2}} ", Field("y", 2), ""], "doubled, they are text too"
    assert parts(escaped("f {{x:2}} g") + "{{h:1}}")[0] == "f {{x:2}} g"


@pytest.mark.parametrize(
    ("canvas", "words"),
    [("no hole", ("has no hole", "{{name:24}}")), ("a {{x:2", ("has no hole",)), ("{{a:1}} {{x:2", ("without }}",)),
     ("{{x}}", ("{{x}}", "cannot be read")), ("{{:3}}", ("{{:3}}",)), ("{{x:0}}", ("{{x:0}}",)), ("{{x:-1}}", ("{{x",)),
     ("{{x:2:float}}", ("{{x:2:float}}",)), ("{{x:choice:}}", ("choice",)), ("{{x:choice:a|a}}", ("a|a",)),
     ("{{x:choice:a|}}", ("a|",)), ("{{x:1}}{{x:2}}", ("several holes called 'x'",))],
)  # fmt: skip
def test_canvases_that_cannot_be_read(canvas: str, words: tuple[str, ...]) -> None:
    with refused(PromptError, *words):
        parts(canvas)


@pytest.mark.parametrize("policy", ["elastic", "full", "prefix", "dual", "interval", "timesteps"])
def test_a_json_skeleton_parses(writer: runtime.Runtime, policy: str) -> None:
    """Whatever the model writes, also at a high temperature: strings stay strings, integers integers."""
    for seed, prompt in enumerate((None, "Give a person as JSON.", "{'a': 1}", '"', "\\ \n")):
        for temperature in (0.0, 3.0):
            drawn: dict[str, Any] = {"temperature": temperature, "seed": seed} if temperature else {}
            filled = writer.fill(SKELETON, prompt, policy, **drawn)
            found = json.loads(filled.text)
            assert isinstance(found["name"], str) and isinstance(found["age"], int) and isinstance(found["ok"], bool)
            assert filled.holes["ok"] == json.dumps(found["ok"]) and not filled.failed
            assert set(filled.ended.values()) <= {"eos", "length"}
            assert filled.tokens <= 6 + 3 + len("false") + 1 and filled.output.computed_fraction <= 1


def test_fixed_text_stays(writer: runtime.Runtime) -> None:
    """Around holes, doubled braces and a mask token's text included."""
    mask = writer.text.decode(np.array([writer.bundle.config.mask_id]), special=True)
    assert mask
    filled = writer.fill(f"A {mask} {{{{{{{{b}}}} {{{{x:2}}}} end{mask}")
    assert filled.text.startswith(f"A {mask} {{{{b}}}} ") and filled.text.endswith(f" end{mask}")
    assert filled.to_json()["holes"] == filled.holes and "trace" not in filled.to_json()


def test_an_edit(writer: runtime.Runtime) -> None:
    text = "Tom has 12 pens {{and}} 3 cups."
    filled = writer.edit(text, [(24, 25), (8, 10)])
    assert filled.text.startswith("Tom has ") and " pens {{and}} " in filled.text and filled.text.endswith(" cups.")
    assert list(filled.holes) == ["1", "2"]
    for spans in ([(3, 3)], [(5, 99)], [(1, 4), (3, 6)], [(-1, 2)]):
        with refused(PromptError, "span", "within it"):
            writer.edit(text, spans)


def test_what_a_canvas_has_no_use_for(writer: runtime.Runtime) -> None:
    with refused(OptionError, "gen_length is for answers"):
        writer.fill("{{x:2}}", gen_length=3)
    with refused(OptionError, "stop has no meaning in a canvas"):
        writer.fill("{{x:2}}", stop="a")
    with refused(OptionError, "grow has no meaning"):
        writer.fill("{{x:2}}", policy="full", grow=True)
    with refused(PromptError, "exceed the bundle's length"):
        writer.fill("{{x:99999}}")
    with refused(PromptError, "holes; give at least one hole"):
        writer.fill([1, 2, 3])
    with refused(PromptError, "put the prompt's ids in front"):
        writer.fill([1, writer.bundle.config.mask_id], "a prompt")


def test_the_command_line(call: Call, writer: runtime.Runtime, tmp_path: Path) -> None:
    bundle, file = str(writer.bundle.root), tmp_path / "canvas.txt"
    file.write_text(SKELETON + "\n")
    code, printed, _ = call(main, "generate", bundle, "--canvas", file, "--json", "--trace", tmp_path / "t.jsonl")
    assert code == 0
    found = json.loads(printed)
    json.loads(found["text"])
    assert found["holes"].keys() == {"name", "age", "ok", "n"} and found["steps"] > 0
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == found["steps"]
    code, printed, _ = call(main, "generate", bundle, "--prompt", "x {{y}} = ", "--suffix", " end", "--gen-length", 4)
    assert code == 0 and printed.startswith("x {{y}} = ") and " end\n" in printed
    for given, words in (
        (("--stream", "--canvas", file), ("--stream has no meaning with --canvas",)),
        (("--suffix", "x"), ("--prompt the text before it",)), ((), ("there is nothing to do",)),
        (("--canvas", tmp_path / "none"), ("none",)),
    ):  # fmt: skip
        failed(call(main, "generate", bundle, *given), 2, *words)
