"""Wrong calls of both command lines, generated: each is one sentence and an exit code, and no file is lost."""

import hashlib
import os
import random
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import export.cli
import runtime.cli
from engines.options import Option
from runtime.cli.options import policy_options
from runtime.decoding.policies import POLICIES
from runtime.decoding.request import OPTIONS
from tests.support.cases import sentence
from tests.support.commands import Call

CALLS = int(os.environ.get("WRONG_CALLS", "200"))  # another number makes other calls
MAIN = {"export": export.cli.main, "runtime": runtime.cli.main}
PARSER = {"export": export.cli.parser, "runtime": runtime.cli.parser}
# A right call of each command but for what is made wrong; B is a bundle, C a checkpoint, all in one folder.
CALL = {
    ("runtime", "generate"): "B --prompt Hi --gen-length 8", ("runtime", "trace"): "B --prompt Hi --gen-length 8",
    ("runtime", "chat"): "B --gen-length 8", ("runtime", "eval"): "B --limit 1 --gen-length 8",
    ("runtime", "calibrate"): "B --limit 20 --gen-length 8", ("runtime", "verify"): "B --prompts 1",
    ("runtime", "bench"): "B --limit 1 --gen-length 8 --prompt-length 100 --backends onnxruntime",
    ("export", "verify"): "B", ("export", "inspect"): "B", ("export", "build"): "--checkpoint C --out new",
}  # fmt: skip
WRONG_BUILDS = """
--out C
--out notes.md
--out mine
--out notes.md/new
--checkpoint missing
--checkpoint B
--checkpoint notes.md
--max-length 0
--max-length 999999
--window 0
--track-num 0
--max-batch 0
--fp16 --bf16
--weights int8 --backend none
--capability 8.9
""".strip().splitlines()
NONSENSE = """
runtime
export
runtime fly
export generate B
runtime generate
runtime generate B C --prompt x
runtime generate missing --prompt x
runtime generate --prompt x --prompts notes.md
runtime generate B --prompts notes.md --stream
runtime generate B --prompts missing
runtime chat C
runtime verify
runtime verify B --backend eager
runtime calibrate B --target-agreement 2
runtime calibrate B --prompts missing
runtime bench B --batches x
runtime bench B --backends x
runtime bench B --limit 0
runtime bench B --baseline x --backends onnxruntime
runtime eval B --limit 0
runtime eval B --few-shot -1
export inspect
export inspect missing
export inspect notes.md
export verify mine
export verify B --atol 0
export verify B --atol nan
""".strip().splitlines()
DECODES = ("generate", "trace", "chat")
Argv = list[str]
Kind = Callable[[random.Random, Path], Argv]


def right(rng: random.Random, *names: str) -> Argv:
    """A right call of one of the commands, or of any."""
    package, command = rng.choice([key for key in CALL if not names or key[1] in names])
    return [package, command, *CALL[package, command].split()]


def actions(argv: Argv, wanted: Callable[[Any], bool]) -> list[str]:
    """The options of a call's command of which `wanted` is true."""
    (commands,) = PARSER[argv[0]]()._subparsers._group_actions  # type: ignore[union-attr]
    parser: Any = commands.choices[argv[1]]  # type: ignore[index,call-overload]
    found = [action for action in parser._actions if action.option_strings and wanted(action)]
    return [action.option_strings[-1 if action.nargs == 0 else 0] for action in found if action.dest != "help"]


def mistyped(rng: random.Random, work: Path) -> Argv:
    argv = right(rng)
    name = rng.choice(actions(argv, lambda action: action.option_strings[0].startswith("--")))
    at = rng.randrange(3, len(name))
    wrong = rng.choice([name[:at] + name[at + 1 :], name[:at] + "q" + name[at:], name + "s"])
    right_ones = actions(argv, lambda action: True)
    return [*argv, wrong if wrong not in right_ones else wrong + "qq", "3"]


def no_number(rng: random.Random, work: Path) -> Argv:
    argv = right(rng, *DECODES, "eval", "bench", "build", "calibrate")
    return [
        *argv,
        rng.choice(actions(argv, lambda a: a.metavar in ("N", "X") or a.type is int)),
        rng.choice(["x", "", "1e"]),
    ]


def no_choice(rng: random.Random, work: Path) -> Argv:
    argv = right(rng, *DECODES, "eval", "build", "verify")
    return [*argv, rng.choice(actions(argv, lambda a: a.choices and a.nargs != 0)), rng.choice(["x", "", "Elastic"])]


def no_value(rng: random.Random, work: Path) -> Argv:
    argv = right(rng)
    takes = actions(argv, lambda a: a.nargs is None)
    return [*argv, rng.choice(takes)] if takes else [*argv, "--what"]


def out_of_range(rng: random.Random, work: Path) -> Argv:
    numbers = [about for about, users in policy_options() if "elastic" in users] + list(OPTIONS.values())
    about: Option = rng.choice([about for about in numbers if about.type in (int, float) and about.low is not None])
    low, high = about.low, about.high
    assert low is not None
    values = [str(about.type(low - 1)), *(["nan"] if about.type is float else [])]
    values += [str(about.type(high + 1))] if high is not None else []
    extra = ["--temperature", "1"] if about.name in ("seed", "top_k", "top_p") else []
    return [*right(rng, *DECODES), about.flag, rng.choice(values), *extra]


def not_used(rng: random.Random, work: Path) -> Argv:
    about, users = rng.choice([(about, users) for about, users in policy_options() if len(users) < len(POLICIES)])
    policy = rng.choice([name for name in POLICIES if name not in users])
    value = {bool: [], int: ["4"], float: ["0.5"], str: [about.choices[0] if about.choices else "x"]}[about.type]
    return [*right(rng, "generate", "chat"), "--policy", policy, about.flag, *value]


def foreign_output(rng: random.Random, work: Path) -> Argv:
    command, flag = rng.choice([("generate", "--trace"), ("trace", "--out"), ("trace", "--plot"), ("eval", "--out"),
                                ("bench", "--out"), ("bench", "--plot")])  # fmt: skip
    return [*right(rng, command), flag, rng.choice(["notes.md", ".", "notes.md/below", "B", "B/manifest.json"])]


def damaged_bundle(rng: random.Random, work: Path) -> Argv:
    bundle = work / "damaged"
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(work / "B", bundle)
    engines = [path for path in bundle.glob("engines/onnxruntime/**/*") if path.is_file()]
    damage(rng, rng.choice([bundle / "manifest.json", bundle / "tokenizer.json", *engines]))
    return [part if part != "B" else "damaged" for part in right(rng, "generate", "trace")]


def damaged_checkpoint(rng: random.Random, work: Path) -> Argv:
    checkpoint = work / "damaged"
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(work / "C", checkpoint)
    damage(rng, rng.choice([checkpoint / "config.json", *checkpoint.glob("*.safetensors")]))
    return ["export", "build", "--checkpoint", "damaged", "--out", "new"]


def damage(rng: random.Random, file: Path) -> None:
    raw = file.read_bytes()
    how = rng.randrange(5)
    if how == 0:
        file.unlink()
    elif how == 1:
        file.write_bytes(b"")
    elif how == 2:
        file.write_bytes(raw[: len(raw) // 2])
    elif how == 3:
        file.write_bytes(rng.randbytes(200))
    else:
        file.unlink()
        file.mkdir()


def damaged_input(rng: random.Random, work: Path) -> Argv:
    file = work / "input"
    file.write_bytes(rng.choice([b"", b"\n\n", b"\xff\xfe\x00\x01", b"[[1], 2]", b"{}", b"1.5 x", b"[999999999]"]))
    flag = rng.choice(["--prompt-ids", "--image"])
    if flag == "--image":
        return [*right(rng, "generate"), flag, rng.choice(["input", "missing", "."])]
    return ["runtime", "generate", "B", "--gen-length", "8", flag, rng.choice(["input", "missing", "."])]


def wrong_build(rng: random.Random, work: Path) -> Argv:
    return ["export", "build", "--checkpoint", "C", "--out", "new", *rng.choice(WRONG_BUILDS).split()]


def nonsense(rng: random.Random, work: Path) -> Argv:
    return rng.choice(NONSENSE).split()


KINDS: list[Kind] = [
    mistyped, no_number, no_choice, no_value, out_of_range, not_used, foreign_output, damaged_bundle,
    damaged_checkpoint, damaged_input, wrong_build, nonsense,
]  # fmt: skip


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.slow
def test_wrong_calls(
    call: Call, text_bundle: Path, text_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No traceback, no exit 0, no file lost, and the commands that a remedy names exist."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(text_bundle, "B")
    shutil.copytree(text_checkpoint, "C")
    Path("notes.md").write_text("# mine\n")
    Path("mine").mkdir()
    Path("mine/work.txt").write_text("mine\n")
    rng = random.Random(CALLS)
    for number in range(CALLS):
        kind = KINDS[number % len(KINDS)]
        package, *argv = kind(rng, tmp_path)
        before = files(tmp_path)
        shown = f"{kind.__name__}: {package} {argv}"
        try:
            code, out, err = call(MAIN[package], *argv)
        except Exception as error:
            raise AssertionError(f"{shown}: a traceback") from error
        assert code in (1, 2), (shown, code, out, err)
        (said,) = (line for line in err.splitlines() if line.startswith("error: "))
        sentence(said)
        assert err.endswith(said + "\n"), (shown, err)
        after = files(tmp_path)
        assert {name: after.get(name) for name in before} == before, (shown, "a file was lost")
        for command in re.findall(r"`(?:python -m )?((?:export|runtime) [^`]+)`", said):
            parses(shlex.split(command), shown)


def parses(words: Argv, shown: str) -> None:
    try:
        PARSER[words[0]]().parse_args(words[1:])
    except SystemExit as ended:
        assert ended.code == 0, (shown, words)
