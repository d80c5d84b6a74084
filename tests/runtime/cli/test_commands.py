"""The two command lines: what they print, and how they fail: one sentence, an exit code, never a traceback."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import export.cli
import runtime
import runtime.cli
from engines.bundle import MANIFEST
from engines.entry import INTERRUPTED
from runtime.decoding.policies import FULL_ATTENTION
from tests.support.cases import ROOT, edit_manifest, sentence
from tests.support.commands import Call, failed, interrupted, process

STATUS = re.compile(
    r"\[onnxruntime\] (\d+) tokens in (\d+) steps, ([\d.]+) s, ([\d.]+) tokens/s, ([\d.]+)% of layer-rows computed"
)


@pytest.fixture
def generate(call: Call) -> Call:
    return lambda *argv: call(runtime.cli.main, "generate", *argv)


# generate


def test_generate(generate: Call, text_bundle: Path) -> None:
    code, out, err = generate(text_bundle, "--prompt", "Hi", "--gen-length", 16)
    assert (code, err) == (0, "")
    text, status = out.rstrip("\n").rsplit("\n", 1)
    found = STATUS.fullmatch(status)
    assert found, out
    with runtime.load(text_bundle, "onnxruntime") as model:
        wanted = model.generate("Hi", gen_length=16)
    assert text == wanted.text and len(text) > 0
    assert (int(found[1]), int(found[2])) == (wanted.tokens, wanted.steps)
    seconds, speed = float(found[3]), float(found[4])
    assert seconds > 0 and abs(speed * seconds / wanted.tokens - 1) < 0.2
    assert found[5] == f"{wanted.computed_fraction:.1%}".rstrip("%")


def test_without_standard_output(text_bundle: Path) -> None:
    """Closed by the shell: nobody reads the answer, and that is no error."""
    argv = [sys.executable, "-m", "runtime", "generate", str(text_bundle), "--prompt", "Hi", "--gen-length", "4"]
    ended = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *argv], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_generate_json(generate: Call, text_bundle: Path) -> None:
    code, out, err = generate(text_bundle, "--prompt", "Hi", "--gen-length", 8, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    record = json.loads(out)
    with runtime.load(text_bundle, "onnxruntime") as model:
        wanted = model.generate("Hi", gen_length=8).to_json()
    timed = {"seconds", "tokens_per_second"}
    assert {k: v for k, v in wanted.items() if k not in timed} == {k: record[k] for k in wanted if k not in timed}
    assert set(record) == {*wanted, "backend", "device"} and record["backend"] == "onnxruntime"
    assert record["seconds"] > 0 and record["tokens_per_second"] > 0


@pytest.mark.parametrize("options", [(), ("--window", 1, "--tokens-per-step", 1), ("--policy", "full")])
def test_generate_stream(generate: Call, text_bundle: Path, options: tuple[object, ...]) -> None:
    """The same text, status line and trace."""
    common = (text_bundle, "--prompt", "Hi", "--gen-length", 24, *options)
    plain, streamed = generate(*common), generate(*common, "--stream")
    assert plain[0] == streamed[0] == 0 and plain[2] == streamed[2] == ""
    assert re.sub(r"[\d.]+ s, [\d.]+", "", plain[1]) == re.sub(r"[\d.]+ s, [\d.]+", "", streamed[1])
    failed(generate(*common, "--stream", "--json"), 2, "not allowed with", "--json")


def test_generate_stream_of_ids(generate: Call, golden_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("3 1 4")
    common = (golden_bundle, "--prompt-ids", tmp_path / "ids", "--gen-length", 12)
    plain, streamed = generate(*common), generate(*common, "--stream", "--trace", tmp_path / "new" / "trace")
    assert streamed[1].splitlines()[0] == plain[1].splitlines()[0] and "[onnxruntime] 12 tokens" in streamed[1]
    assert (tmp_path / "new" / "trace").read_text().startswith('{"step": 0')
    failed(generate(*common, "--system", "Be kind."), 2, "--system is a message before a text", "leave --system out")


def test_generate_system(generate: Call, text_bundle: Path, tmp_path: Path) -> None:
    common = (text_bundle, "--gen-length", 12, "--json")
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "Hi"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n{"prompt_ids": [1]}\n')
    code, lines, _ = generate(*common, "--prompts", asked, "--system", "Be kind.")
    first, second, third = map(json.loads, lines.splitlines())
    assert code == 2 and "--system is a message before a text" in third["error"]
    record = json.loads(generate(*common, "--prompt", "Hi", "--system", "Be kind.")[1])
    assert record["ids"] == first["ids"] == second["ids"]
    with runtime.load(text_bundle, "onnxruntime") as model:
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        assert record["ids"] == model.generate(messages, gen_length=12).ids != model.generate("Hi", gen_length=12).ids


def test_generate_options_reach_the_run(generate: Call, golden_bundle: Path, tmp_path: Path) -> None:
    """Each option of the command line does what the same keyword does."""
    ids = tmp_path / "ids"
    ids.write_text("[3, 1, 4, 1, 5, 9, 2, 6]")
    cases: dict[str, dict[str, Any]] = {
        "--window 4 --threshold 0.5 --gamma 0.95 --drift head --track-num 3":
            {"window": 4, "threshold": 0.5, "gamma": 0.95, "drift": "head", "track_num": 3},
        "--tokens-per-step 2 --no-block-caching --refresh-scope near":
            {"tokens_per_step": 2, "block_caching": False, "refresh_scope": "near"},
        "--policy full --steps 8 --block-length 12": {"policy": "full", "steps": 8, "block_length": 12},
        "--policy interval --prompt-interval 5 --response-interval 2 --threshold 0.4":
            {"policy": "interval", "prompt_interval": 5, "response_interval": 2, "threshold": 0.4},
        "--temperature 2 --seed 5": {"temperature": 2.0, "seed": 5},
        "--no-stop-at-eos": {"stop_at_eos": False},
    }  # fmt: skip
    seen = set()
    with runtime.load(golden_bundle, "onnxruntime") as model:
        for argv, options in cases.items():
            common = (golden_bundle, "--prompt-ids", ids, "--gen-length", 24, "--json", "--trace", tmp_path / "trace")
            code, out, err = generate(*common, *argv.split())
            assert (code, err) == (0, ""), argv
            wanted = model.generate([3, 1, 4, 1, 5, 9, 2, 6], gen_length=24, **options)
            record = json.loads(out)
            assert (record["ids"], record["steps"], record["computed_fraction"]) == (
                wanted.ids,
                wanted.steps,
                wanted.computed_fraction,
            ), argv
            trace = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
            assert len(trace) == wanted.steps
            for line, event in zip(trace, wanted.trace, strict=True):
                assert {**line, "seconds": 0} == {**event.to_json(), "seconds": 0}
            seen.add((tuple(wanted.ids), wanted.steps, wanted.computed_fraction))
    assert len(seen) >= len(cases) - 1, "the options make a difference"


def test_generate_on_eager(generate: Call, text_bundle: Path) -> None:
    code, out, _ = generate(text_bundle, "--prompt", "Hi", "--gen-length", 8, "--backend", "eager", "--json")
    assert code == 0 and json.loads(out)["backend"] == "eager"


def test_ids_from_a_file(generate: Call, golden_bundle: Path, tmp_path: Path) -> None:
    answers = set()
    for number, text in enumerate(("[3, 1, 4]", "3 1 4", " 3\n1\t4\n")):
        (tmp_path / str(number)).write_text(text)
        code, out, _ = generate(golden_bundle, "--prompt-ids", tmp_path / str(number), "--gen-length", 6, "--json")
        assert code == 0
        answers.add(tuple(json.loads(out)["ids"]))
    assert len(answers) == 1 and len(answers.pop()) == 6


def test_the_prompt_from_standard_input(generate: Call, text_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi"))
    read = generate(text_bundle, "--prompt", "-", "--gen-length", 8, "--json")
    given = generate(text_bundle, "--prompt", "Hi", "--gen-length", 8, "--json")
    assert read[0] == given[0] == 0 and json.loads(read[1])["ids"] == json.loads(given[1])["ids"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    failed(generate(text_bundle, "--prompt", "-"), 2, "the prompt is empty", "give some text")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"))
    failed(generate(text_bundle, "--prompt", "-"), 2, "standard input is not text", "UTF-8")


def test_generate_stop(generate: Call, text_bundle: Path) -> None:
    common = (text_bundle, "--prompt", "Hi", "--gen-length", 24, "--window", 1, "--tokens-per-step", 1, "--json")
    free = json.loads(generate(*common)[1])
    stop = free["text"][5:7]
    stopped = json.loads(generate(*common, "--stop", stop)[1])
    assert stopped["text"] == free["text"].split(stop)[0] and stopped["steps"] < free["steps"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [("--prompt= ", 2, ("the prompt is empty", "give some text")), ("", 2, ("nothing to do", "--prompt", "--canvas")),
     ("--prompt Hi --prompt-ids x", 2, ("not allowed with", "--help")),
     ("--prompt Hi --window 17", 2, ("window 17", "exceeds 16", "build it again with", "--window 17")),
     ("--prompt Hi --window 0", 2, ("window", "1 … 16", "0")),
     ("--prompt Hi --window x", 2, ("--window", "invalid int", "--help")),
     ("--prompt Hi --track-num 2", 2, ("track_num 2 exceeds 1", "build it again with", "--track-num 2")),
     ("--prompt Hi --threshold 1.5", 2, ("threshold", "(0, 1]", "1.5")),
     ("--prompt Hi --gamma -1", 2, ("gamma", "0.0 … 1.0", "-1.0")),
     ("--prompt Hi --drift x", 2, ("--drift", "invalid choice", "row", "--help")),
     ("--prompt Hi --policy dual --block-length 300", 2, ("block_length", "1 … 200", "300")),
     ("--prompt Hi --policy full --steps 7", 2, ("steps 7", "cannot be spread evenly", "must be a multiple")),
     ("--prompt Hi --policy full --window 4", 2, ("policy full does not use window", "its options are")),
     ("--prompt Hi --policy dual --gamma 0.5", 2, ("policy dual does not use gamma", "its options are")),
     ("--prompt Hi --policy prefix --no-block-caching", 2, ("prefix does not use block_caching", "its options are")),
     ("--prompt Hi --steps 4", 2, ("policy elastic does not use steps", "its options are")),
     ("--prompt Hi --threshold 0.5 --tokens-per-step 2", 2, ("threshold and tokens_per_step", "give one")),
     ("--prompt Hi --gen-length 0", 2, ("gen_length", "1 … 256", "0")),
     ("--prompt Hi --gen-length 252", 2, ("6 prompt ids", "gen_length 252", "length 256", "shorten one of them")),
     ("--prompt Hi --temperature -1", 2, ("temperature", "from 0 up", "-1")),
     ("--prompt Hi --seed 1", 2, ("seed", "no effect without temperature", "--temperature")),
     ("--prompt Hi --temperature 1 --seed -1", 2, ("seed", "0 …", "-1")),
     ("--prompt Hi --stop=", 2, ("stop", "empty", "leave it out")),
     ("--prompt Hi --threads 0", 2, ("threads must lie in 1 …", "cores", "0")),
     ("--prompt Hi --threads 1000000", 2, ("threads must lie in 1 …", "cores", "1000000")),
     ("--prompt Hi --backend x", 2, ("--backend", "invalid choice", "onnxruntime", "--help")),
     ("--prompt Hi --colour 1", 2, ("--colour", "--help")),
     ("--prompt <|mdm_mask|>", 2, ("mask id 256", "leave it out")),
     ("--prompt caf\udce9", 2, ("not valid Unicode", "UTF-8"))],
)  # fmt: skip
def test_generate_refuses(generate: Call, text_bundle: Path, argv: str, code: int, words: tuple[str, ...]) -> None:
    """Options are read with gen_length 200, where the case gives no other."""
    given = argv.split(" ") if argv else []
    length = [] if "--gen-length" in given else ["--gen-length", "200"]
    given = [arg + " " if arg == "--prompt=" else arg for arg in given if arg]
    failed(generate(text_bundle, *given, *length), code, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [("", ("the prompt is empty", "at least one id")), ("[]", ("the prompt is empty", "at least one id")),
     ("[1, 300]", ("id 300", "vocabulary of 256", "tokenizer")), ("-1", ("id -1", "vocabulary of 256", "tokenizer")),
     ("1 255", ("mask id 255", "leave it out")), ("1.5", ("cannot read ids", "[1, 2, 3]")),
     ("[1.5]", ("integers", "[1, 2, 3]")), ("[1", ("cannot read ids", "[1, 2, 3]")),
     ("[[1], [2, 3]]", ("flat list", "[1, 2, 3]")), ('[{"a": 1}]', ("role", "content", "write")),
     ('{"a": 1}', ("cannot read ids", "[1, 2, 3]")), ("one two", ("cannot read ids", "[1, 2, 3]")),
     ("\udcff", ("cannot read ids", "[1, 2, 3]")), (None, ("cannot read ids", "No such file", "[1, 2, 3]")),
     ("[" * 100_000, ("cannot read ids", "[1, 2, 3]"))],
)  # fmt: skip
def test_ids_that_are_none(
    generate: Call, golden_bundle: Path, tmp_path: Path, content: str | None, words: tuple[str, ...]
) -> None:
    path = tmp_path / "ids"
    if content is not None:
        path.write_text(content, errors="surrogateescape")
    failed(generate(golden_bundle, "--prompt-ids", path, "--gen-length", 8), 2, *words)


def test_bundles_that_are_none(generate: Call, bundle_copy: Path, tmp_path: Path) -> None:
    again = "python -m export build"
    failed(generate(tmp_path / "nothing", "--prompt", "Hi"), 1, "no bundle", str(tmp_path / "nothing"), again)
    weights = bundle_copy / "onnx" / "layer_00.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    failed(generate(bundle_copy, "--prompt", "Hi"), 1, "layer_00.safetensors", "SHA-256", again)
    weights.unlink()
    failed(generate(bundle_copy, "--prompt", "Hi"), 1, "layer_00.safetensors is missing", again)
    edit_manifest(bundle_copy, lambda m: m.update(version=9))
    failed(generate(bundle_copy, "--prompt", "Hi"), 1, "manifest version 9", "update")
    (bundle_copy / MANIFEST).write_text("{")
    failed(generate(bundle_copy, "--prompt", "Hi"), 1, MANIFEST, "damaged", again)
    (bundle_copy / MANIFEST).unlink()
    failed(generate(bundle_copy, "--prompt", "Hi"), 1, "not finished", again)


def test_without_a_bundle(generate: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed(generate("--prompt", "Hi"), 1, "no bundle at bundles/demo", "python -m export build")


def test_without_a_back_end(generate: Call, text_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    failed(generate(text_bundle, "--prompt", "Hi"), 1, "no back end is installed", "pip install", "[cpu]")


# Traces and full disks


def test_a_trace_that_cannot_be_written(generate: Call, text_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    common = (text_bundle, "--prompt", "Hi", "--gen-length", 8, "--trace")
    for path, reason in (("file/trace", "not a directory"), ("", "Is a directory")):
        failed(generate(*common, tmp_path / path), 2, "cannot write", path, reason, "choose another file for the trace")
    failed(generate(*common, "/dev/full"), 2, "cannot write /dev/full", "No space left on device", "for the trace")
    failed(generate(*common, tmp_path / "file"), 2, "file holds something else", "choose another file for the trace")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_refused_request_keeps_an_older_trace(generate: Call, text_bundle: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text('{"step": "of yesterday"}')
    for argv in (("--prompt", " "), ("--prompt", "Hi", "--window", 99), ("--prompt", "Hi", "--gen-length", 300)):
        assert generate(text_bundle, "--trace", trace, *argv)[0] == 2
        assert trace.read_text() == '{"step": "of yesterday"}'


@pytest.mark.slow
@pytest.mark.parametrize("target", ["/dev/full", "closed", "narrow"])
def test_standard_output(text_bundle: Path, target: str) -> None:
    """A full disk is an error in one sentence, a reader who left is none, and a narrow encoding loses nothing."""
    argv = ("runtime", "generate", text_bundle, "--prompt", "Hi", "--gen-length", 8)
    if target == "/dev/full":
        with open(target, "w") as full:
            child = process(*argv, stdout=full)
        _, err = child.communicate(timeout=240)
        assert child.returncode == 1
        sentence(err, "error: ", "cannot write the output", "No space left on device", "check the disk")
    elif target == "closed":
        reader, writer = os.pipe()
        os.close(reader)
        child = process(*argv, stdout=writer)
        os.close(writer)
        _, err = child.communicate(timeout=240)
        assert (child.returncode, err) == (1, "")
    else:
        child = process(*argv, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        out, err = child.communicate(timeout=240)
        assert (child.returncode, err) == (0, "") and "tokens/s" in out and out.isascii()
        with runtime.load(text_bundle, "onnxruntime") as model:
            text = model.generate("Hi", gen_length=8).text
        assert out.startswith(text.encode("ascii", "backslashreplace").decode()) and not text.isascii()


# Ctrl-C


def test_interrupted_while_generating(golden_bundle: Path, tmp_path: Path) -> None:
    """The trace of the steps so far is kept, whole lines."""
    (tmp_path / "ids").write_text("1 2 3")
    argv = ("--policy", "full", "--gen-length", 500, "--block-length", 500, "--steps", 500, "--no-stop-at-eos")
    trace = tmp_path / "trace"
    child = process("runtime", "generate", golden_bundle, "--prompt-ids", tmp_path / "ids", "--trace", trace, *argv)
    wait(lambda: trace.exists() and trace.read_text().count("\n") >= 3, child)
    interrupted(child)
    steps = [json.loads(line)["step"] for line in trace.read_text().splitlines()]
    assert steps == list(range(len(steps))) and 3 <= len(steps) < 500


def wait(done: Callable[[], bool], child: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 240
    while not done():
        assert child.poll() is None and time.monotonic() < end, child.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(("package", "slow"), [("export", "platform"), ("runtime", "jinja2"), ("runtime", "argparse")])
def test_interrupted_while_starting(tmp_path: Path, package: str, slow: str) -> None:
    """Importing takes seconds, too: here one module, of the package or of the command line, takes forever."""
    (tmp_path / f"{slow}.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(1000)\n")
    child = process(package, "--help", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert child.stdout is not None and child.stdout.readline() == "begun\n"
    interrupted(child)


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [True, False])
def test_no_signal_handler_is_installed(ignored: bool) -> None:
    """Neither by the packages nor by their command lines; where the shell had Ctrl-C ignored, it stays so."""
    code = """
import signal
before = signal.getsignal(signal.SIGINT)
import export, runtime
from export.__main__ import main as export_main
from runtime.__main__ import main as runtime_main
export.build, runtime.load
try:
    runtime_main()
except SystemExit as ended:
    print(ended.code, before is signal.getsignal(signal.SIGINT), before is signal.SIG_IGN)
"""
    trap = "trap '' INT; " if ignored else ""
    command = ["sh", "-c", f'{trap}exec "$@"', "sh", sys.executable, "-c", code, "--version"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == f"0 True {ignored}"


# verify


def test_verify(call: Call, text_bundle: Path) -> None:
    code, printed, err = call(runtime.cli.main, "verify", text_bundle, "--prompts", 1)
    assert code == 0 and "[ok] all tokens agree" in printed
    assert re.findall(r"^(\w+): \d of 1 runs equal", printed, re.M) == FULL_ATTENTION
    assert re.findall(r"^verify: (\d) of 6, [\d.]+ s$", err, re.M) == list("123456") and err.count("\n") == 6
    code, printed, err = call(runtime.cli.main, "verify", text_bundle, "--prompts", 1, "--json", "-q")
    assert (code, err) == (0, "") and [json.loads(line)["policy"] for line in printed.splitlines()] == FULL_ATTENTION
    failed(call(runtime.cli.main, "verify", text_bundle, "--prompts", 0), 2, "prompts must lie in 1 …", "0")
    failed(call(runtime.cli.main, "verify", text_bundle, "--backend", "eager"), 2, "eager is the reference", "another")


@pytest.mark.slow
def test_quantised_tokens_are_shown_and_not_judged(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export.build(tiny_checkpoint, tmp_path / "b", weights="int4")
    code, printed, err = call(runtime.cli.main, "verify", bundle, "--prompts", 2, "--quiet")
    assert (code, err) == (0, "") and "[ok] int4" in printed and "all tokens agree" not in printed
    shares = [float(share) for share in re.findall(r"^\w+: ([\d.]+)% of tokens", printed, re.M)]
    assert len(shares) == len(FULL_ATTENTION) and 0 < sum(shares) < 100 * len(shares)


# eval


@pytest.mark.slow
def test_eval_goes_on_where_it_stopped(call: Call, text_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results"
    argv = ("eval", text_bundle, "--task", "sums", "--gen-length", 16, "--json", "--out", file)
    code, printed, err = call(runtime.cli.main, *argv, "--limit", 2)
    assert code == 0 and re.sub(r"[\d.]+ s", "", err) == "sums default: 1 of 2, \nsums default: 2 of 2, \n"
    assert printed.startswith("{") and printed.count("\n") == 1, "JSON, and no table"
    summary = json.loads(printed.splitlines()[-1])
    assert summary["problems"] == 2 and summary["exact_match"] == 0 and summary["tokens_per_second"] > 0
    lines = file.read_text().splitlines()
    assert [json.loads(line)["result"]["number"] for line in lines] == [0, 1]
    assert json.loads(call(runtime.cli.main, *argv, "--limit", 2)[1].splitlines()[-1]) == summary
    assert file.read_text().splitlines() == lines, "nothing was run again"
    file.write_text("5\n[]\nnull\n" + lines[0] + "\n" + lines[1][:-9])  # strange lines, and one cut short
    code, printed, _ = call(runtime.cli.main, *argv, "--limit", 3)
    assert code == 0 and json.loads(printed.splitlines()[-1])["problems"] == 3
    kept = file.read_text().splitlines()
    assert kept[3] == lines[0] and kept[4] == lines[1][:-9]
    assert [json.loads(line)["result"]["number"] for line in kept[5:]] == [1, 2]
    call(runtime.cli.main, *argv, "--limit", 1, "--window", 4)
    assert json.loads(file.read_text().splitlines()[-1])["key"]["window"] == 4, "other options, other results"


@pytest.mark.slow
def test_eval_compares_two_policies(call: Call, text_bundle: Path, tmp_path: Path) -> None:
    argv = (
        "eval",
        text_bundle,
        "--task",
        "sums",
        "--gen-length",
        16,
        "--limit",
        2,
        "--out",
        tmp_path / "results",
        "--json",
    )
    code, printed, _ = call(runtime.cli.main, *argv, "--policy", "full", "--against", "full")
    found = json.loads(printed.splitlines()[-1])
    assert code == 0 and found["paired"] == "full" and found["agreement"] == 1.0 and found["p"] == 1.0
    code, printed, _ = call(runtime.cli.main, *argv, "--against", "full")
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [line.get("policy") for line in lines] == ["elastic", "full", None]
    assert 0 <= lines[-1]["agreement"] <= 1 and lines[-1]["low"] <= lines[-1]["difference"] <= lines[-1]["high"]


@pytest.mark.slow
def test_eval_with_solved_problems_before_each(call: Call, text_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "results"
    argv = ("eval", text_bundle, "--task", "sums", "--gen-length", 16, "--limit", 1, "--out", file)
    assert call(runtime.cli.main, *argv)[0] == call(runtime.cli.main, *argv, "--few-shot", 200)[0] == 0
    keys = [json.loads(line)["key"]["few_shot"] for line in file.read_text().splitlines()]
    assert keys == [0, 200], "other prompts, other results"


def test_eval_refuses(call: Call, text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("eval", text_bundle, "--task", "sums", "--gen-length", 16)
    failed(call(runtime.cli.main, *argv, "--limit", 0), 2, "limit must lie in 1 …", "0")
    failed(call(runtime.cli.main, *argv, "--limit", 10**8), 2, "limit must lie in", "100000")
    failed(call(runtime.cli.main, *argv, "--limit", 1, "--few-shot", -5), 2, "few_shot", "tokens", "-5")
    failed(call(runtime.cli.main, *argv, "--limit", 1, "--few-shot", 10**9), 2, "few_shot must lie in 0 … 240")
    failed(call(runtime.cli.main, *argv, "--limit", 1, "--gen-length", 256), 2, "gen_length must lie in 1 … 255")
    failed(call(runtime.cli.main, *argv, "--task", "chess"), 2, "--task", "invalid choice", "sums", "--help")
    failed(call(runtime.cli.main, *argv, "--limit", 1, "--out", tmp_path), 2, "Is a directory", "choose another --out")
    (tmp_path / "notes.md").write_text("# mine\n")
    foreign = ("--limit", 1, "--out", tmp_path / "notes.md")
    failed(call(runtime.cli.main, *argv, *foreign), 2, "something else than results", "another --out")
    assert (tmp_path / "notes.md").read_text() == "# mine\n"
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "results"
    failed(call(runtime.cli.main, *argv, "--limit", 1, "--out", below), 2, f"cannot write {below}", "choose another")
    monkeypatch.setattr("runtime.evaluation.exact_match.LONGEST_PROMPT", 5)
    failed(
        call(runtime.cli.main, *argv, "--limit", 1),
        2,
        "tokens for almost every problem of sums",
        "another --task",
    )


# Help


def subparsers(main: Any) -> dict[str, Any]:
    parser: Any = {export.cli.main: export.cli.parser, runtime.cli.main: runtime.cli.parser}[main]()
    (commands,) = parser._subparsers._group_actions
    return dict(commands.choices)


@pytest.mark.parametrize("main", [export.cli.main, runtime.cli.main])
def test_help_shows_defaults_and_an_example(call: Call, main: Any) -> None:
    for name, parser in subparsers(main).items():
        code, printed, _ = call(main, name, "--help")
        text = " ".join(printed.split())
        assert code == 0 and "(default: None)" not in text and "(default: [])" not in text
        (example,) = re.findall(r"^example:\n  python -m \w+ (.+)$", printed, re.M)
        assert parser.prog.endswith(f" {name}") and example.startswith(f"{name} ")
        parser.parse_args(shlex.split(example)[1:])
        entries = {re.split("[ ,]", entry)[0]: entry for entry in re.split(r"^  (?=-)", printed, flags=re.M)[1:]}
        for action in parser._actions:
            if action.option_strings and action.dest not in ("help", "log_level") and not action.required:
                assert "default" in entries[action.option_strings[0]], (name, action.dest)


@pytest.mark.parametrize(
    ("argv", "words"),
    [("generate --promt Hi", ("unknown option --promt (the closest is --prompt)",)),
     ("generate --promt=Hi", ("unknown option --promt (the closest is --prompt)",)),
     ("generate -promt Hi", ("unknown option -promt",)), ("generate --gen 8 --prompt Hi", ("unknown option --gen",)),
     ("trace --polt x.png", ("unknown option --polt (the closest is --plot)",)), ("--verison", ("--version",)),
     ("verify --backends onnxruntime", ("unknown option --backends (the closest is --backend)",)),
     ("bench --backend onnxruntime", ("unknown option --backend (the closest is --backends)",)),
     ("generate --prompt --json", ("--prompt", "expected one argument"))],
)  # fmt: skip
def test_a_mistyped_option_is_named(call: Call, argv: str, words: tuple[str, ...]) -> None:
    """Before what it makes missing."""
    failed(call(runtime.cli.main, *argv.split()), 2, *words, "--help")


def test_values_that_look_like_options(generate: Call, text_bundle: Path) -> None:
    assert generate(text_bundle, "--prompt", "-- what?", "--gen-length", 4)[0] == 0
    assert generate(text_bundle, "--prompt=--what", "--gen-length", 4)[0] == 0
    assert generate("--prompt", "Hi", "--gen-length", 4, "--", text_bundle)[0] == 0


@pytest.mark.parametrize(
    ("main", "argv", "resumes"),
    [(export.cli.main, ("verify", "b"), False), (export.cli.main, ("build", "--dry-run"), False),
     (export.cli.main, ("build",), True), (runtime.cli.main, ("eval", "--out", "r.jsonl"), True),
     (runtime.cli.main, ("eval",), False), (runtime.cli.main, ("bench", "--out", "b.json"), False)],
)  # fmt: skip
def test_only_what_resumes_says_so(
    call: Call, main: Any, argv: tuple[str, ...], resumes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    for name in ("export.cli.verify_command", "export.cli.build_command", "runtime.cli.measures.eval_command",
                 "runtime.cli.bench_command"):  # fmt: skip
        monkeypatch.setattr(name, interrupted)
    code, _, err = call(main, *argv)
    assert code == INTERRUPTED and ("go on where it stopped" in err) is resumes


@pytest.mark.parametrize(
    ("main", "commands"),
    [(export.cli.main, ("build", "verify", "inspect")), (runtime.cli.main, ("generate", "eval", "verify"))],
)
def test_help(call: Call, main: Any, commands: tuple[str, ...]) -> None:
    code, printed, _ = call(main, "--help")
    assert code == 0 and all(command in printed for command in commands)
    for command in commands:
        code, printed, err = call(main, command, "--help")
        assert (code, err) == (0, "") and "usage: python -m" in printed
    failed(call(main), 2, "command", "--help")
    failed(call(main, "fly"), 2, "invalid choice: 'fly'", commands[0], "--help")
