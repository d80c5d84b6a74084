"""Every command that a message advises is run as it is printed, and what failed before it works after it.

A message in the code that advises a command must stand in this table: `test_every_message_is_here` finds them all.
"""

import ast
import math
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import export
import export.cli
import export.verify
import runtime
import runtime.cli
from engines.bundle import MANIFEST, Bundle
from engines.errors import BackendError, BundleError, ElasticError, ParityError, RangeError
from export.half import verify_half
from export.verify.difference import Difference
from scripts.import_graph import PRODUCT
from tests.support.cases import edit_manifest
from tests.test_imports import trees

MAIN: dict[str, Callable[[list[str]], int]] = {"export": export.cli.main, "runtime": runtime.cli.main}
COMMAND = re.compile(r"`((?:python -m )?(?:export|runtime)[^`]*)`")
MAKERS = {"rebuild", "enlarge"}  # functions that make a command
CHECK = "verify", "bundle"  # bundle.verify, the command that compares parts
OVERFLOW = "model.transformer.blocks.0.ff_out.weight"


@dataclass
class Place:
    """A checkpoint and a bundle of it, which a situation changes."""

    checkpoint: Path
    root: Path
    patch: pytest.MonkeyPatch

    def load(self) -> None:
        runtime.load(self.root).close()

    def ask(self, **options: Any) -> None:
        with runtime.load(self.root, threads=1) as model:
            model.generate([5, 6, 7], **{"gen_length": 4, **options})

    def damaged(self, change: Callable[[Path], object]) -> Callable[[], object]:
        change(self.root)
        return self.load

    def edited(self, change: Callable[[dict[str, Any]], object]) -> Callable[[], object]:
        edit_manifest(self.root, change)
        return self.load

    def overflowing(self, **options: Any) -> Callable[[], object]:
        """A checkpoint whose activations leave the range of fp16."""
        (file,) = self.checkpoint.glob("*.safetensors")
        save_file({n: t * 1e4 if n == OVERFLOW else t for n, t in load_file(file).items()}, file)
        return lambda: export.build(self.checkpoint, self.root.with_name("half"), precision="fp16", **options)


Situation = Callable[[Place], Callable[[], object]]  # brings it about; returns the call that fails
SITUATIONS: dict[str, tuple[str, Situation]] = {  # name -> (function with the message, situation)
    "no bundle there": ("engines.bundle:read_manifest", lambda p: lambda: runtime.load(p.root.with_name("none"))),
    "a checkpoint for a bundle": ("engines.bundle:read_manifest", lambda p: lambda: runtime.load(p.checkpoint)),
    "no manifest": ("engines.bundle:read_manifest", lambda p: p.damaged(lambda root: (root / MANIFEST).unlink())),
    "a damaged manifest": (
        "engines.bundle:read_manifest", lambda p: p.damaged(lambda root: (root / MANIFEST).write_bytes(b"{"))
    ),
    "an older version": ("engines.bundle:read_manifest", lambda p: p.edited(lambda m: m.update(version=1))),
    "an unknown key": ("engines.bundle:read_manifest", lambda p: p.edited(lambda m: m.update(colour=1))),
    "a key of the model": ("engines.bundle:open", lambda p: p.edited(lambda m: m["model"].update(colour=1))),
    "a file that is not listed": (
        "engines.bundle:file", lambda p: p.edited(lambda m: m["files"].pop("onnx/layer_01.cpu.onnx"))
    ),
    "a missing file": ("engines.bundle:file", lambda p: p.damaged(lambda root: (root / "onnx/embed.onnx").unlink())),
    "a damaged file": (
        "engines.bundle:file", lambda p: p.damaged(lambda root: (root / "onnx/head.safetensors").write_bytes(b"x"))
    ),
    "a name outside": ("engines.bundle:inside", lambda p: p.edited(lambda m: m["files"].update({"../x": {}}))),
    "a part without an engine": (
        "engines.bundle:graph", lambda p: p.edited(lambda m: m["engines"]["onnxruntime"]["parts"].pop("layer_01"))
    ),
    "no engines": (
        "engines.bundle:engines",
        lambda p: (p.edited(lambda m: m["engines"].clear()), lambda: runtime.load(p.root, "onnxruntime"))[1],
    ),
    "defaults of a later version": ("runtime.api:__init__", lambda p: p.edited(lambda m: m["defaults"].update(x=1))),
    "ids beyond the length": (
        "engines.model:logits",
        lambda p: lambda: runtime.load(p.root).logits([5] * 31)
    ),
    "a prompt beyond the length": ("runtime.decoding.request:check_length", lambda p: lambda: p.ask(gen_length=30)),
    "a wider window": ("runtime.decoding.request:check_capacity", lambda p: lambda: p.ask(window=9)),
    "more tracked tokens": ("runtime.decoding.request:check_capacity", lambda p: lambda: p.ask(track_num=2)),
    "a larger batch": (
        "runtime.decoding.request:check_batch",
        lambda p: lambda: runtime.load(p.root).generate_batch([[5]] * 3, gen_length=4),
    ),
    "numbers beyond fp16": ("export.job:_write_weights", lambda p: p.overflowing()),
    "numbers beyond fp16, with force": ("export.job:_write_weights", lambda p: p.overflowing(force=True)),
}  # fmt: skip
ELSEWHERE = {  # function with the message -> where its command is run, or why it cannot be
    "engines.bundle:rebuild": "makes the command for the others",
    "engines.bundle:enlarge": "makes the command for the others",
    "engines.cli:program": "the name of the program in help and usage",
    "runtime.bench.cases:machine": "the command of the run, which the figures keep",
    "engines.ort.sessions:__exit__": "test_commands_that_check",
    "runtime.decoding.controller:__init__": "test_commands_that_check",
    "runtime.decoding.generate:begin": "hands the command to the controller",
    "engines.trt.model:load_engine": "needs an NVIDIA GPU",
    "engines.trt.model:compatible_package": "needs an NVIDIA GPU",
    "export.half:verify_half": "test_half_of_a_bundle",
    "export.folder:existing_bundle": "test_the_bundle_of_another_checkpoint",
    "export.verify:verify": "test_parts_that_differ",
    "runtime.evaluation.parity:verify": "test_commands_that_check",
    "runtime.cli.prompts:asked": "test_commands_that_check",
    "runtime.evaluation.in_place:encoded": "tests/runtime/evaluation/test_puzzles.py",
}


@pytest.fixture
def place(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "the 'best' $MODEL"))
    root = export.build(checkpoint, tmp_path / "my bundle", window=8, max_length=30, max_batch=2)
    monkeypatch.chdir(tmp_path)  # where a command without --out builds
    return Place(checkpoint, root, monkeypatch)


def commands(text: str) -> list[list[str]]:
    """The arguments of the commands in a message, from the package on."""
    found = [shlex.split(command.removeprefix("python -m ")) for command in COMMAND.findall(text)]
    assert found, f"no command in: {text}"
    return found


def run(words: list[str]) -> int:
    try:
        return MAIN[words[0]](words[1:])
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_remedy(place: Place, name: str) -> None:
    _, situation = SITUATIONS[name]
    call = situation(place)
    with pytest.raises(ElasticError) as caught:
        call()
    for words in commands(str(caught.value)):
        assert run(words) == 0, words
        if "--help" in words:
            continue
        if "--out" in words and Path(words[words.index("--out") + 1]) != place.root:
            runtime.load(words[words.index("--out") + 1]).close()  # of a build that is asked for in another precision
        elif "--checkpoint" in words and "--out" not in words:
            runtime.load(Path("bundles") / place.checkpoint.name).close()
        else:
            call()


def test_commands_that_check(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of messages about wrong numbers: they check this bundle, and say so where it is fine."""
    with runtime.load(place.root, "onnxruntime", threads=1) as model, monkeypatch.context() as patch:
        sessions = model.model.sessions  # type: ignore[attr-defined]
        patch.setattr(type(sessions), "_session", lambda *_: Broken())
        with pytest.raises(BackendError) as caught:
            model.generate([5], gen_length=4)
    said = [str(caught.value)]
    with runtime.load(place.root, "onnxruntime", threads=1) as model, monkeypatch.context() as patch:
        patch.setattr(type(model.model.new_runner(4)), "head", lambda self, rows: (rows, np.full(len(rows), np.nan)))
        with pytest.raises(BackendError) as caught:
            model.generate([5], "full", gen_length=4)
    said.append(str(caught.value))
    for text in said:
        for words in commands(text):
            assert words == ["export", "verify", str(place.root)] and run(words) == 0
            assert "[ok]" in capsys.readouterr().out
    assert run(shlex.split("runtime generate --help")) == 0


class Broken:
    """A session that fails."""

    def run_with_iobinding(self, binding: object) -> None:
        raise RuntimeError("out of luck")

    run = run_with_iobinding


def test_parts_that_differ(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not those of the graphs: the advice builds the bundle again, and it verifies then."""
    monkeypatch.setattr(Bundle, "check", lambda *_: None)
    monkeypatch.setattr(Bundle, "file", lambda bundle, name: bundle.root / name)
    file = place.root / "onnx/layer_00.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Difference, "within", lambda *_: False)
        with pytest.raises(ParityError) as caught:
            list(export.verify.verify(Bundle.open(place.root), "onnxruntime", 5e-4))
    assert file.is_file()
    for words in commands(str(caught.value)):
        assert run(words) == 0
    list(export.verify.verify(Bundle.open(place.root), "onnxruntime", 5e-4))


def test_the_bundle_of_another_checkpoint(place: Place, text_checkpoint: Path) -> None:
    """What is left of a bundle of another checkpoint: its own command mends it."""
    (place.root / MANIFEST).write_bytes(b"{")
    with pytest.raises(BundleError) as caught:
        export.build(text_checkpoint, place.root)
    (words,) = commands(str(caught.value))
    assert run(words) == 0
    place.load()


def test_half_of_a_bundle(place: Place) -> None:
    """A bundle in fp16 that would overflow on a GPU is built in bf16."""
    half = export.build(place.checkpoint, place.root.with_name("in half"), precision="fp16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.half._largest", lambda values: math.nan)
        with pytest.raises(RangeError) as caught:
            list(verify_half(Bundle.open(half)))
    (words,) = commands(str(caught.value))
    assert run(words) == 0 and Bundle.open(half).manifest.precision == "bf16"


def sites() -> Iterator[str]:
    """The functions of the product that put a command into a text: `python -m …`, or what makes one."""
    for module, tree in trees(*PRODUCT).items():
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef) or module.endswith("__main__"):
                continue
            docstring = ast.get_docstring(function, clean=False)
            for node in ast.walk(function):
                said = isinstance(node, ast.Constant) and "python -m" in str(node.value) and node.value != docstring
                made = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in MAKERS
                made = made or (isinstance(node, ast.Attribute) and ast.unparse(node) == "self.record.command")
                named = isinstance(node, ast.Attribute) and (node.attr, getattr(node.value, "attr", "")) == CHECK
                if said or made or named:
                    yield f"{module}:{function.name}"


def test_every_message_is_here() -> None:
    covered = {site for site, _ in SITUATIONS.values()} | set(ELSEWHERE)
    found = set(sites())
    assert found - covered == set(), "messages with a command that no test runs"
    assert covered <= found, "functions that have no such message any more"
