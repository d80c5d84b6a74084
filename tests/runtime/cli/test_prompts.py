"""Files of prompts: what is read from them whatever the locale, one bad prompt among good ones, and going on later."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import runtime
import runtime.cli
from engines.errors import PromptError
from engines.options import from_shell
from runtime.cli.prompts import Asked, read_lines, read_prompt, read_prompts
from tests.support.cases import ROOT, refused, sentence
from tests.support.commands import Call, failed

LONG = "x" * 500


@pytest.fixture
def generate(call: Call, text_bundle: Path) -> Call:
    common = ("--gen-length", 8, "--threads", 1)
    return lambda *argv: call(runtime.cli.main, "generate", text_bundle, *argv, *common)


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Put bytes on standard input, which the locale would read as Latin-1."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "latin-1"))


# What is read


@pytest.mark.parametrize(
    ("content", "wanted"),
    [(b"a\nb\n", ["a", "b"]), (b"\xef\xbb\xbfa\r\nb", ["a", "b"]), ("Größe 日本\n".encode(), ["Größe 日本"]),
     ("a\u2028b\x85c\x0bd\x1ce\n\nf".encode(), ["a\u2028b\x85c\x0bd\x1ce", "f"]), (b" a \n\r\n\t\n", [" a "]),
     (b'{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}], "id": 7}\n{"prompt_ids": [1, 2]}',
      ["a", [{"role": "user", "content": "b"}], [1, 2]]),
     (b'{"x": 1}\nb', ['{"x": 1}', "b"]), (b'{x}\n{"prompt": "a"}', ["{x}", '{"prompt": "a"}'])],
)  # fmt: skip
def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, wanted: list[Any]) -> None:
    """UTF-8 without a byte order mark, cut at line feeds only; JSON objects where the first line is one."""
    file = tmp_path / "prompts"
    file.write_bytes(content)
    assert read_lines(file) == wanted
    piped(monkeypatch, content)
    assert read_lines("-") == wanted


@pytest.mark.parametrize(
    ("content", "wanted"),
    [(b"Hi\n", "Hi"), (b"Hi\r\n", "Hi"), (b"Hi\n\n", "Hi\n"), (b"\xef\xbb\xbf\xc3\xa9", "é"), (b"a\nb\n", "a\nb")],
)
def test_a_prompt_by_pipe(monkeypatch: pytest.MonkeyPatch, content: bytes, wanted: str) -> None:
    """The newline at its end is the shell's."""
    piped(monkeypatch, content)
    assert read_prompt("-", None) == wanted


def test_sources_that_are_none(generate: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed(generate("--prompts", tmp_path / "no"), 2, "cannot read prompts", str(tmp_path / "no"), "No such file")
    failed(generate("--prompts", tmp_path), 2, "cannot read prompts", "directory")
    file = tmp_path / "p"
    file.write_bytes("Größe\n".encode("utf-16"))
    failed(generate("--prompts", file), 2, "is UTF-16", "save it as UTF-8")
    file.write_bytes(b"\xef\xbb\xbf \n\n")
    failed(generate("--prompts", file), 2, "holds no prompt", "one per line")
    file.write_bytes(b"a\ncaf\xe9\n")
    with refused(PromptError, "line 2", "not text", "UTF-8"):
        read_lines(file)
    for closed in (None, io.StringIO()):
        if closed is not None:
            closed.close()
        monkeypatch.setattr(sys, "stdin", closed)
        for argv in (("--prompt", "-"), ("--prompts", "-")):
            failed(generate(*argv), 2, "standard input is closed", "--prompt TEXT")


@pytest.mark.slow
@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=str
)
def test_any_locale(text_bundle: Path, tmp_path: Path, locale: dict[str, str]) -> None:
    """The same text by argument, by pipe and from a file makes the same prompt, under ASCII as under UTF-8."""
    text = "Größe ≠ 日本?"
    file = tmp_path / "p.txt"
    file.write_bytes(text.encode() + b"\n")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    command = [sys.executable, "-m", "runtime", "generate", str(text_bundle), "--json", "--gen-length", "4"]
    with runtime.load(text_bundle, "onnxruntime", threads=1) as model:
        wanted = model.generate(text, gen_length=4).ids
    for given in (["--prompt", "-"], ["--prompt", text], ["--prompts", str(file)]):
        argv = [os.fsencode(word) if word != text else text.encode() for word in (*command, *given)]
        done = subprocess.run(argv, cwd=ROOT, input=text.encode(), capture_output=True, env=clean | locale)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["ids"] == wanted, given


def test_arguments_are_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("latin-1", "surrogateescape"))
    assert from_shell("GrÃ¶Ã\x9fe") == "Größe" and from_shell("Gr\udcc3\udcb6\udcc3\udc9fe") == "Größe"
    for kept in ("Größe", "日本", "a\udcffb", "plain"):
        assert from_shell(kept) == kept


# One bad prompt


def test_one_bad_prompt(generate: Call, tmp_path: Path, text_bundle: Path) -> None:
    """It is one line with its error and number; the others are answered, and the exit status says so."""
    file = tmp_path / "p.txt"
    file.write_bytes("\n".join([*(f"number {n}" for n in range(5)), "", LONG, "last"]).encode() + b"\ncaf\xe9\n")
    code, out, err = generate("--prompts", file, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 2 and [line["prompt"] for line in lines] == list(range(1, 9))
    bad = [line for line in lines if "error" in line]
    assert [(line["prompt"], line["line"]) for line in bad] == [(6, 7), (8, 9)]
    assert "exceed the bundle's length" in bad[0]["error"] and "not text" in bad[1]["error"]
    sentence(err, "2 of 8 prompts", "6, 8")
    with runtime.load(text_bundle, "onnxruntime", threads=1) as model:
        for line, text in ((lines[4], "number 4"), (lines[6], "last")):
            assert line["ids"] == model.generate(text, gen_length=8).ids
    code, out, err = generate("--prompts", file)
    assert code == 2 and out.count("\n") >= 7 and "[7] " in out and "6 prompts" in out
    assert "error: prompt 6 (line 7): " in err and "error: prompt 8 (line 9): " in err and "2 of 8 prompts" in err


def test_what_concerns_all_is_refused_before_the_first(generate: Call, tmp_path: Path) -> None:
    file, out = tmp_path / "p.txt", tmp_path / "out"
    file.write_text("a\nb\n", encoding="utf-8")
    failed(generate("--prompts", file, "--window", 99, "--out", out), 2, "window", "99")
    assert not out.exists()


def test_behind_a_system_message(generate: Call, tmp_path: Path, text_bundle: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "Hi"}\n{"prompt_ids": [1]}\n', encoding="utf-8")
    code, out, _ = generate("--prompts", file, "--system", "Be brief.", "--json")
    good, bad = map(json.loads, out.splitlines())
    with runtime.load(text_bundle, "onnxruntime", threads=1) as model:
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        assert good["ids"] == model.generate(said, gen_length=8).ids
    assert code == 2 and "--system is a message before a text" in bad["error"]


# JSON lines


def test_options_of_a_line(generate: Call, tmp_path: Path, text_bundle: Path) -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": "Hi", "id": "a"}, {"prompt": "Hi", "gen_length": 4}, {"prompt": "Hi", "policy": "full", "steps": 4},
        {"messages": [{"role": "user", "content": "Hi"}], "id": {"n": 1}}, {"prompt_ids": [1, 2, 3], "eos_id": [5, 6]},
    ]  # fmt: skip
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    code, out, err = generate("--prompts", file, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and [line.get("id") for line in lines] == ["a", None, None, {"n": 1}, None]
    with runtime.load(text_bundle, "onnxruntime", threads=1) as model:
        wanted = [
            model.generate("Hi", gen_length=8), model.generate("Hi", gen_length=4),
            model.generate("Hi", "full", gen_length=8, steps=4), model.generate("Hi", gen_length=8),
            model.generate([1, 2, 3], gen_length=8, eos_id=[5, 6]),
        ]  # fmt: skip
    assert [(line["ids"], line["steps"], line["ended"]) for line in lines] == [
        (out.ids, out.steps, out.ended) for out in wanted
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "no JSON object"), ("[1]", "no JSON object"), ('{"id": 1}', "no JSON object"), ('"Hi"', "no JSON object"),
     ('{"prompt": "a", "messages": []}', "one of prompt"), ('{"prompt": 5}', "prompt is not a text"),
     ('{"messages": "a"}', "messages is not a list"), ('{"messages": [1]}', "messages is not a list of objects"),
     ('{"prompt_ids": [1.5]}', "prompt_ids is not a list of ids"), ('{"prompt_ids": [true]}', "list of ids"),
     ('{"prompt": "a", "colour": 1}', "no option colour"), ('{"prompt": "a", "embeddings": 1}', "no option embeddings"),
     ('{"prompt": "a", "policy": 1}', "policy is not a text"), ('{"prompt": "a", "policy": "x"}', "unknown policy 'x'"),
     ('{"prompt": "a", "gen_length": "8"}', "gen_length must lie"),
     ('{"prompt": "a", "window": []}', "window must lie"),
     ('{"prompt": "a", "policy": "full", "window": 4}', "does not use window"), ('{"messages": []}', "empty"),
     ('{"messages": [{"role": "user"}]}', "role"), ('{"prompt_ids": []}', "empty"), ('{"prompt": ""}', "empty"),
     ('{"prompt": "\\ud800"}', "not valid Unicode"), ('{"prompt": "a", "stop": 5}', "stop must be text"),
     ('{"prompt_ids": [99999999999999999999]}', "integers"), ("[" * 100_000, "no JSON object")],
)  # fmt: skip
def test_a_line_that_is_no_request(generate: Call, tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "Hi"}\n' + line + "\n", encoding="utf-8")
    code, out, err = generate("--prompts", file, "--json")
    good, bad = (json.loads(each) for each in out.splitlines())
    assert code == 2 and good["tokens"] >= 0 and (bad["prompt"], bad["line"]) == (2, 2)
    sentence(bad["error"], words)
    sentence(err, "1 of 2 prompts")


# Going on


def test_going_on_where_a_file_ends(generate: Call, tmp_path: Path) -> None:
    """Answers are kept as they come; what is there is not answered again, errors and a line cut short are."""
    file, out = tmp_path / "p.txt", tmp_path / "out.jsonl"
    file.write_text("one\ntwo\n" + LONG + "\nfour\n", encoding="utf-8")
    assert generate("--prompts", file, "--out", out)[0] == 2
    lines = out.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["prompt"] for record in records] == [1, 2, 3, 4] and "error" in records[2]
    failed(generate("--prompts", file, "--out", out), 2, "exists", "--resume", "choose another --out")
    out.write_text("\n".join([lines[0], lines[2], lines[3][:40]]), encoding="utf-8")
    code, shown, _ = generate("--prompts", file, "--out", out, "--resume", "--json")
    assert code == 2 and [json.loads(line)["prompt"] for line in shown.splitlines()] == [2, 3, 4]
    again = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in again] == [1, 2, 3, 4]
    assert [record.get("ids") for record in again] == [record.get("ids") for record in records]
    file.write_text("one\ntwo\nthree\nfour\n", encoding="utf-8")  # the bad one is corrected
    code, shown, _ = generate("--prompts", file, "--out", out, "--resume")
    assert code == 0 and shown.startswith("[3] ") and "3 were answered before" in shown
    code, shown, _ = generate("--prompts", file, "--out", out, "--resume")
    assert code == 0 and "4 were answered before" in shown and out.read_text(encoding="utf-8").count("\n") == 4


def test_files_that_are_not_gone_on_with(generate: Call, tmp_path: Path) -> None:
    """Answers to other prompts, by other options, and files of other programs: refused, and left as they are."""
    file, out = tmp_path / "p.txt", tmp_path / "out.jsonl"
    file.write_text("one\ntwo\n", encoding="utf-8")
    assert generate("--prompts", file, "--out", out)[0] == 0
    kept = out.read_bytes()
    failed(generate("--prompts", file, "--out", out, "--resume", "--window", 4), 2, "other prompts, options or bundles")
    file.write_text("one\nthree\n", encoding="utf-8")
    failed(generate("--prompts", file, "--out", out, "--resume"), 2, "other prompts", "choose another --out")
    assert out.read_bytes() == kept
    for content in (b"mine\n", b"{}\n", b"[]\n"):
        out.write_bytes(content)
        failed(generate("--prompts", file, "--out", out, "--resume"), 2, "something other than answers")
        assert out.read_bytes() == content
    failed(generate("--prompts", file, "--out", tmp_path, "--resume"), 2, "cannot write", "Is a directory")
    failed(generate("--prompts", file, "--resume"), 2, "--out")
    failed(generate("--prompt", "Hi", "--out", out), 2, "--out and --resume", "--prompts")
    failed(generate("--prompts", file, "--out", file / "out"), 2, "cannot write", "choose another --out")
    assert generate("--prompts", file, "--out", tmp_path / "new" / "out")[0] == 0
    assert (tmp_path / "new" / "out").read_text(encoding="utf-8").count("\n") == 2


def test_a_key_is_of_all_that_an_answer_depends_on() -> None:
    one = Asked(1, 1, "a", {"window": 4}, 7)
    others = [Asked(2, 1, "a", {"window": 4}, 7), Asked(1, 1, "b", {"window": 4}, 7), Asked(1, 1, "a", {}, 7)]
    keys = {one.key("bundle"), one.key("other"), *(other.key("bundle") for other in others)}
    assert len(keys) == 5 and one.key("bundle") == Asked(1, 9, "a", {"window": 4}, 7).key("bundle")


def test_prompts_have_numbers_and_lines(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"\na\n\nb")
    assert [(one.number, one.line) for one in read_prompts(tmp_path / "p")] == [(1, 2), (2, 4)]
