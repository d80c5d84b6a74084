"""Tokenizers and templates: a bundle's ids are those of transformers, whatever files the checkpoint has."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import export
import runtime
from engines.bundle import MANIFEST, Bundle
from engines.config import ModelConfig
from engines.errors import BackendError, CheckpointError
from engines.files import describe
from export.checkpoint import Family, canonical, tokenizer
from export.checkpoint.families.dream import FAMILY as DREAM
from export.checkpoint.families.llada import FAMILY as LLADA
from export.checkpoint.reader import open_checkpoint
from runtime.text import Text
from tests.support import folders
from tests.support.cases import edit_manifest, refused
from tests.support.folders import BOS, EOS, EOT, FIRST, MASK, OTHER, SPECIAL, TEMPLATE, WAYS

TEXTS = (
    "It's DON'T, the three men",
    "  two\n\nlines\r\n\t",
    "naïve café 日本語 🙂 e\u0301",
    f"a {EOT} b{EOS}c<|IM|>",
    "",
)
QUESTION = "if a < b && c > 'd': naïve 日本"
TURNS = [
    {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "The three.\n"},
    {"role": "user", "content": "And?"},
]  # fmt: skip
Made = Callable[..., Text]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "plain"
    folders.write_folder(folder)
    return folder


@pytest.fixture
def model(text_bundle: Path) -> ModelConfig:
    config = Bundle.open(text_bundle).config
    return replace(config, vocab=400, mask_id=FIRST + 3, eos_id=FIRST + 1, eot_id=FIRST + 2)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions are answered in this process, so that transformers is imported once."""
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(tokenizer, "ask", lambda request: canonical.answer(request, lambda: None))


@pytest.fixture
def made(text_bundle: Path, model: ModelConfig, tmp_path: Path) -> Made:
    """The text side of a bundle of a tokenizer's folder; `text_bundle` gives the rest of the manifest."""

    def make(folder: Path, family: Family = LLADA) -> Text:
        bundle = tmp_path / f"bundle of {folder.name}"
        bundle.mkdir()
        (bundle / MANIFEST).write_bytes((text_bundle / MANIFEST).read_bytes())
        files = tokenizer.canonical(folder, family, model)
        for name, content in files.items():
            (bundle / name).write_bytes(content)

        def change(manifest: dict[str, Any]) -> None:
            kept = {name: entry for name, entry in manifest["files"].items() if name not in tokenizer.FILES}
            manifest["files"] = kept | {name: describe(bundle / name) for name in files}

        edit_manifest(bundle, change)
        return Text(Bundle.open(bundle))

    return make


def bent(plain: Path, tmp_path: Path, *changes: folders.Change, name: str = "folder") -> Path:
    """A copy of the plain folder with changes."""
    folder = tmp_path / name
    for path in plain.iterdir():
        folder.mkdir(exist_ok=True, parents=True)
        (folder / path.name).write_bytes(path.read_bytes())
    for change in changes:
        change(folder)
    return folder


def same(text: Text, truth: Any) -> None:
    """The ids of texts and chats are those of the tokenizer `truth` of transformers."""
    truth.backend_tokenizer.no_truncation()
    for string in TEXTS:
        assert text.encode(string).tolist() == truth(string, add_special_tokens=False)["input_ids"], string
        assert text.encode(string, whole=True).tolist() == truth(string)["input_ids"], string
    if truth.chat_template is None:
        assert text.prompt(QUESTION).tolist() == truth(QUESTION)["input_ids"]
        return
    for chat in (TURNS, TURNS[:1]):
        wanted = truth.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert text.prompt(chat).tolist() == wanted
    assert text.prompt(QUESTION).tolist() == wanted


# The same as transformers


def test_there_are_enough_ways() -> None:
    assert len(WAYS) >= 40


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[] if number % 8 == 1 else [pytest.mark.slow]) for number, way in enumerate(WAYS)],
)
def test_ids_are_those_of_transformers(way: str, plain: Path, made: Made, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = bent(plain, tmp_path, *WAYS[way])
    same(made(folder), AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False))


@pytest.mark.slow
def test_in_a_process_of_its_own(plain: Path, made: Made, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = bent(plain, tmp_path, *WAYS["generation tag"], *WAYS["truncation"])
    same(made(folder), AutoTokenizer.from_pretrained(str(folder), local_files_only=True))


@pytest.mark.usefixtures("here")
def test_the_right_ids(plain: Path, made: Made, tmp_path: Path) -> None:
    """What transformers is relied on for, once by hand: truncation off, special tokens whole, BOS in its place."""
    text = made(bent(plain, tmp_path, *WAYS["truncation"], *WAYS["tokens in added_tokens_decoder"]))
    bos, _, eot, _, header, end = (FIRST + number for number in range(6))
    user, assistant, said = (text.encode(word).tolist() for word in ("user", "assistant", QUESTION))
    line = text.encode("\n\n").tolist()
    wanted = [bos, header, *user, end, *line, *said, eot, header, *assistant, end, *line]
    assert text.prompt(QUESTION).tolist() == wanted and len(wanted) > 32
    base = made(bent(plain, tmp_path, *WAYS["BOS by the post-processor"], name="base"))
    assert base.prompt(QUESTION).tolist() == [bos, *said] and base.encode(QUESTION).tolist() == said
    assert text.decode(text.prompt(QUESTION)).startswith("user\n\nif a")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("code", [folders.CODE, {"tokenizer_class": "DreamTokenizer"}, {"tokenizer_class": None}])
def test_the_family_names_the_class(code: dict[str, Any], plain: Path, made: Made, tmp_path: Path) -> None:
    """A class that is code of the checkpoint is not run: Dream's equals Qwen2's."""
    from transformers import Qwen2Tokenizer

    folder = bent(plain, tmp_path, folders.pair, folders.settings(**code))
    (folder / "tokenization_dream.py").write_text("raise SystemExit('it was run')")
    same(made(folder, DREAM), Qwen2Tokenizer.from_pretrained(str(folder)))


@pytest.mark.usefixtures("here")
def test_no_class_equals_the_code(plain: Path, made: Made, tmp_path: Path) -> None:
    folder = bent(plain, tmp_path, folders.settings(**folders.CODE))
    with refused(CheckpointError, str(folder), "DreamTokenizer", "not run", "save the tokenizer"):
        made(folder)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("change", "source"),
    [(folders.file("chat_template.json", {"chat_template": OTHER}), OTHER),
     (folders.file("chat_template.json", {"chat_template": folders.named(default=OTHER, rag="x")}), OTHER),
     (folders.file("chat_template.json", {"chat_template": {"default": OTHER}}), OTHER),
     (folders.file("chat_template.jinja", "\ufeff" + OTHER), OTHER)],
)  # fmt: skip
def test_templates_of_processors_and_editors(
    change: folders.Change, source: str, plain: Path, made: Made, tmp_path: Path
) -> None:
    """Where transformers' tokenizer has no template, or one that begins with a byte order mark."""
    text = made(bent(plain, tmp_path, folders.settings("chat_template"), change))
    wanted = made(bent(plain, tmp_path, folders.settings(chat_template=source), name="wanted"))
    assert text.prompt(QUESTION).tolist() == wanted.prompt(QUESTION).tolist()
    assert text.render("Hi").startswith(f"{BOS}!")


@pytest.mark.usefixtures("here")
def test_byte_order_marks(plain: Path, made: Made, tmp_path: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "config.json")
    changes = [*WAYS["tokens in added_tokens.json"], folders.file("special_tokens_map.json", {"bos_token": BOS})]
    with_marks = made(bent(plain, tmp_path, *changes, folders.bom(*names)))
    without = made(bent(plain, tmp_path, *changes, name="without"))
    assert with_marks.prompt(QUESTION).tolist() == without.prompt(QUESTION).tolist()


@pytest.mark.usefixtures("here")
def test_dropout_is_off(plain: Path, made: Made, tmp_path: Path) -> None:
    """BPE dropout, left by a training script, would draw other ids for every prompt."""
    text = made(
        bent(plain, tmp_path, folders.edit("tokenizer.json", lambda content: content["model"].update(dropout=0.5)))
    )
    wanted = made(bent(plain, tmp_path, name="wanted"))
    assert all(text.prompt(QUESTION).tolist() == wanted.prompt(QUESTION).tolist() for _ in range(9))


# What is refused, and what is noted


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("template", "said"),
    [("{% for m in messages %}", "the chat template fails"), ("{{ messages[0].nothing.more }}", "'dict object' has no"),
     ("{{ raise_exception('two\nlines') }}", "two"), ("{{ ''.__class__ }}", "leaves the"),
     ("{{ bos_token }}", "leaves the user"),
     ("", "leaves the user"), (5, "template"), (folders.named(rag=TEMPLATE, tools="x"), "rag, tools"),
     ("{{ messages[0].content }}\ud800", "utf-8")],
)  # fmt: skip
def test_a_template_that_cannot_render(template: Any, said: str, plain: Path, made: Made, tmp_path: Path) -> None:
    """It fails the build; a base model goes without it, with a warning."""
    folder = bent(plain, tmp_path, folders.settings(chat_template=template))
    with refused(CheckpointError, str(folder), said):
        made(folder)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["LLaDA-8B-Base", "Dream-v0-Base-7B", "my_base"])
def test_a_base_model(name: str, plain: Path, made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = bent(plain, tmp_path, folders.settings(chat_template="{{ nothing.more }}"), name=name)
    text = made(folder)
    assert text.template is None and text.prompt("Hi").tolist() == text.encode("Hi").tolist()
    assert "no chat template" in caplog.text and "'nothing' is undefined" in caplog.text
    for wrong in ("database", "LLaDA-8B-Instruct", "baseline"):
        assert not tokenizer.is_base(bent(plain, tmp_path, name=wrong))
    hub = bent(plain, tmp_path, name="models--GSAI-ML--LLaDA-8B-Base/0f1e2d")
    assert tokenizer.is_base(hub)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "said"),
    [("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "too often"),
     ("{{ 'a' * 10**10 }}", "too large"), ("{{ '{:>9999999999}'.format(1) }}", "fails")],
)  # fmt: skip
def test_a_template_without_bounds(template: str, said: str, plain: Path, made: Made, tmp_path: Path) -> None:
    """Our rendering is bounded, and its process has bounds of time and memory."""
    folder = bent(plain, tmp_path, folders.settings(chat_template=template))
    with refused(CheckpointError, str(folder), "chat template", said):
        made(folder)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("change", "words"),
    [(folders.settings(extra_special_tokens=[f"<{n}>" for n in range(80)]), ("has id", "400 rows")),
     (folders.settings(mask_token=EOT), ("mask's id", str(FIRST + 2), str(FIRST + 3), "config.json")),
     (folders.settings(eos_token=MASK), ("mask's id", "that of an end")),
     (folders.file("generation_config.json", {"mask_token_id": 7}), ("mask's id", "7", "generation_config.json")),
     (folders.without(*SPECIAL), ("the mask's id", MASK)),
     (folders.file("tokenizer.json", "version https://git-lfs"), ("tokenizer.json", "cannot be read as JSON")),
     (folders.file("tokenizer_config.json", "[]"), ("tokenizer_config.json", "list", "object")),
     (folders.file("added_tokens.json", "{"), ("added_tokens.json", "JSON")),
     (folders.file("tokenizer.json", "{}"), ("transformers cannot read it",)),
     (folders.settings(bos_token=["x"]), ("transformers cannot read it", "bos_token")),
     (folders.file("chat_template.json", "7"), ("chat_template.json", "int"))],
)  # fmt: skip
def test_what_is_refused(
    change: folders.Change, words: tuple[str, ...], plain: Path, made: Made, tmp_path: Path
) -> None:
    folder = bent(
        plain, tmp_path, folders.tokenizer() if words == ("the mask's id", MASK) else folders.settings(), change
    )
    if words == ("the mask's id", MASK):
        folders.settings(extra_special_tokens=[MASK, *SPECIAL[:3]])(folder)
    with refused(CheckpointError, str(folder), *words):
        made(folder)


@pytest.mark.usefixtures("here")
def test_what_is_noted(plain: Path, made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Other padding ids, and tokens whose ids transformers makes others."""
    made(bent(plain, tmp_path))
    assert not caplog.text
    moved = {str(FIRST + 20): {"content": "<moved>", "special": True}}
    folder = bent(
        plain, tmp_path, folders.settings(pad_token=EOT, added_tokens_decoder=folders.decoder() | moved), name="other"
    )
    made(folder)
    assert f"padding different ids ({FIRST + 1}, {FIRST + 2})" in caplog.text
    assert f"'<moved>' has id {FIRST + 6} as transformers reads it, not {FIRST + 20}" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_without_a_tokenizer(tiny_checkpoint: Path) -> None:
    assert set(open_checkpoint(tiny_checkpoint).texts()) <= {"config.json", "generation_config.json"}


def test_one_file_of_two(plain: Path, made: Made, tmp_path: Path) -> None:
    folder = bent(plain, tmp_path, folders.pair)
    (folder / "merges.txt").unlink()
    with refused(CheckpointError, "vocab.json", "no merges.txt"):
        made(folder)


def test_transformers_is_not_installed(
    plain: Path, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused(BackendError, "transformers", "not installed", "elastic-diffusion[export]"):
        made(plain)


@pytest.mark.parametrize(
    ("signal", "said"),
    [("XCPU", "the chat template does not come to an end"), ("KILL", "cannot be read (status -9)")],
)
def test_a_process_that_is_killed(
    signal: str, said: str, plain: Path, model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nkill -{signal} $$\n", encoding="ascii")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    with refused(CheckpointError, str(plain), said):
        tokenizer.canonical(plain, LLADA, model)


def test_a_process_that_gives_no_answer(plain: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with refused(CheckpointError, str(plain), "cannot be read (status 1)"):
        tokenizer.canonical(plain, LLADA, model)


# Ids of tokens


@pytest.mark.parametrize(
    "way", ["plain", "tokens in added_tokens_decoder", "tokens in added_tokens.json", "two files of Qwen2"]
)
def test_ids_by_text(way: str, plain: Path, tmp_path: Path) -> None:
    folder = bent(plain, tmp_path, *WAYS[way])
    assert [tokenizer.special_id(folder, text) for text in SPECIAL] == list(range(FIRST, FIRST + 6))
    assert tokenizer.special_id(folder, "<nothing>") is None is tokenizer.special_id(folder, None)
    assert tokenizer.special_id(tmp_path / "nowhere", EOT) is None


@pytest.mark.parametrize("content", [{"added_tokens": [{"content": EOT}]}, {"added_tokens": 5}, {"model": 5}])
def test_ids_of_damaged_files(content: Any, plain: Path, tmp_path: Path) -> None:
    folder = bent(plain, tmp_path, folders.file("tokenizer.json", content))
    with refused(CheckpointError, str(folder), "no ids"):
        tokenizer.special_id(folder, EOT)


# In a build


@pytest.mark.slow
def test_a_build_of_two_files(text_checkpoint: Path, tmp_path: Path) -> None:
    """Nothing is made again until a file changes; a refusal comes before any part is made."""
    folder = bent(text_checkpoint, tmp_path, folders.pair, folders.settings(tokenizer_class="Qwen2Tokenizer"))
    bundle = export.build(folder, tmp_path / "bundle", backends=[])
    with runtime.load(bundle, "eager", threads=1) as loaded:
        assert loaded.text.decode(loaded.text.encode("It's")) == "It's"
        assert loaded.text.prompt("Hi").tolist() == [258, 259, *loaded.text.encode("Hi"), 257, 260]
    before = (bundle / "tokenizer.json").stat().st_mtime_ns
    assert export.build(folder, tmp_path / "bundle", backends=[]) == bundle, "again, and nothing to do"
    assert (bundle / "tokenizer.json").stat().st_mtime_ns == before
    folders.settings(chat_template="{{ messages[0].content }}#")(folder)
    export.build(folder, tmp_path / "bundle", backends=[])
    assert Text(Bundle.open(bundle)).render("Hi") == "Hi#"
    (folder / "merges.txt").write_text("nonsense that is no pair\n", encoding="utf-8")
    with refused(CheckpointError, "cannot be used"):
        export.build(folder, tmp_path / "other", backends=[])
    assert not (tmp_path / "other" / "onnx").exists()
