"""Text in and out: untrusted templates are rendered in a sandbox, and special tokens come in several forms."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from engines.bundle import MANIFEST, Bundle
from engines.errors import BundleError, PromptError
from engines.files import describe
from runtime.text import Text
from tests.support.cases import SPECIAL, TEMPLATE, edit_manifest, refused

BOS, EOS, USER, ASSISTANT = 258, 257, 259, 260
CONFIG, JINJA = "tokenizer_config.json", "chat_template.jinja"


@pytest.fixture
def text(text_bundle: Path) -> Text:
    return Text(Bundle.open(text_bundle))


def changed(bundle: Path, tmp_path: Path, **files: str | None) -> Text:
    """The text side of a bundle with other files: only the manifest and these are there."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    contents: dict[str, str | None] = {name: (bundle / name).read_text() for name in ("tokenizer.json", CONFIG, JINJA)}
    named = {"config": CONFIG, "jinja": JINJA, "tokenizer": "tokenizer.json"}
    contents |= {named[key]: content for key, content in files.items()}  # type: ignore[misc]
    (folder / MANIFEST).write_bytes((bundle / MANIFEST).read_bytes())

    def change(manifest: dict[str, Any]) -> None:
        for name, content in contents.items():
            manifest["files"].pop(name, None)
            if content is not None:
                (folder / name).write_text(content, errors="surrogateescape")
                manifest["files"][name] = describe(folder / name)

    edit_manifest(folder, change)
    return Text(Bundle.open(folder))


def letters(text: Text, string: str) -> list[int]:
    return list(map(int, text.encode(string)))


# Ids and text


@pytest.mark.parametrize("string", ["Hi", "a\nb\tc", "∀x ∈ ℝ — 日本語 🙂", " leading", "x" * 300])
def test_there_and_back(text: Text, string: str) -> None:
    ids = text.encode(string)
    assert len(ids) == len(string.encode()) and ids.max() < 256, "a token a byte, none special"
    assert text.decode(ids) == string


def test_special_tokens_are_left_out_of_text(text: Text) -> None:
    assert text.decode(text.encode("<|startoftext|>Hi<|endoftext|>")) == "Hi"
    assert letters(text, "".join(SPECIAL)) == [256, 257, 258, 259, 260]


def test_the_template(text: Text) -> None:
    """Special tokens come as texts, also one that was an object in the checkpoint (EOS)."""
    tokens = json.loads((text.bundle.root / CONFIG).read_text())["special_tokens"]
    assert tokens == {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    assert text.prompt("Hi").tolist() == [BOS, USER, *letters(text, "Hi"), EOS, ASSISTANT]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    a, b, c = letters(text, "abc")
    assert text.prompt(turns).tolist() == [BOS, USER, a, EOS, ASSISTANT, b, EOS, USER, c, EOS, ASSISTANT]


def test_a_base_model(text_bundle: Path, tmp_path: Path) -> None:
    """Without a template the prompt is the text, and what the tokenizer puts around it."""
    tokenizer = json.loads((text_bundle / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "<|startoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|startoftext|>": {"id": "<|startoftext|>", "ids": [BOS], "tokens": ["<|startoftext|>"]}},
    }  # fmt: skip
    base = changed(text_bundle, tmp_path, jinja=None, tokenizer=json.dumps(tokenizer))
    assert base.template is None and base.prompt("Hi").tolist() == [BOS, *letters(base, "Hi")]
    turns: list[dict[str, Any]] = [{"role": "user", "content": one} for one in ("a", [{"type": "text", "text": "b"}])]
    assert base.prompt(turns).tolist() == [BOS, *letters(base, "a\nb")]


def test_a_template_puts_bos_itself(text_bundle: Path, tmp_path: Path) -> None:
    jinja = changed(text_bundle, tmp_path, jinja="{{ messages[0].content }}!\r\n{{ missing }}{{ bos_token }}-")
    assert jinja.render("Hi") == "Hi!\n<|startoftext|>-", "undefined is nothing"


def test_split_special_tokens(text_bundle: Path, tmp_path: Path) -> None:
    text = changed(text_bundle, tmp_path, config=json.dumps({"split_special_tokens": True}))
    assert len(text.encode("<|user|>")) == len("<|user|>")


# Prompts


@pytest.mark.parametrize("prompt", ["", " \n\t ", [], [{"role": "user", "content": " "}]])
def test_empty(text: Text, prompt: Any) -> None:
    with refused(PromptError, "the prompt is empty", "give some text"):
        text.prompt(prompt)


@pytest.mark.parametrize(
    "turn", [{}, {"role": "user"}, {"content": "x"}, {"role": "user", "content": None}, {"role": 1, "content": "x"}, 5]
)
def test_messages_that_are_none(text: Text, turn: Any) -> None:
    with refused(PromptError, "message 2", "role", "content", "write"):
        text.prompt([{"role": "user", "content": "x"}, turn])


def test_content_in_parts(text: Text) -> None:
    """As clients of the common chat interface send it."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert text.render([{"role": "user", "content": parts}]) == text.render("a\nb")
    assert text.render([{"role": "user", "content": parts[:1]}]) == text.render("a") == text.render(np.str_("a"))
    assert text.render(({"role": "user", "content": ["a"], "name": "x", "tool_calls": None},)) == text.render("a")
    assert "None" not in text.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}] * 2)
    assert text.messages([{"role": "assistant", "content": None}, {"role": "user", "content": "b"}])[0] == {
        "role": "assistant"
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [([{"type": "image_url", "image_url": {}}], ("type image_url", "images")), ([5], ("type int",)),
     ([{"type": "text"}], ("part of type text", "write")), ({"text": "a"}, ("content of type dict",)),
     (object(), ("not plain data", "write")), (5, ("content of type int",))],
)  # fmt: skip
def test_content_that_is_none(text: Text, content: Any, words: tuple[str, ...]) -> None:
    with refused(PromptError, "message 1", *words):
        text.prompt([{"role": "user", "content": content}])


def test_text_that_is_no_unicode(text: Text) -> None:
    """As a shell passes bytes that are not UTF-8."""
    with refused(PromptError, "not valid Unicode", "UTF-8"):
        text.prompt(os.fsdecode(b"caf\xe9"))


# Untrusted templates


@pytest.mark.parametrize(
    ("template", "named"),
    [("{{ ''.__class__ }}", "__class__"), ("{{ ''['__class__'] }}", "__class__"),
     ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "__class__"),
     ("{{ messages|attr('__class__') }}", "__class__"), ("{{ '{0.__class__}'.format(1) }}", "__class__"),
     ("{{ raise_exception.__globals__ }}", "__globals__"), ("{{ raise_exception.__code__ }}", "__code__"),
     ("{{ cycler.__init__.__globals__.os.system('true') }}", "__init__"),
     ("{{ lipsum.__globals__['os'] }}", "__globals__"), ("{{ self._TemplateReference__context }}", "_Template"),
     ("{% set x = ''.__class__ %}quiet", "__class__"), ("{% if ''.__class__ %}{% endif %}quiet", "__class__"),
     ("{{ messages.append(1) }}", "append"), ("{{ messages[0].update(role='system') }}", "update"),
     ("{% for m in messages %}{{ m.pop('content') }}{% endfor %}", "pop"),
     ("{% include '/etc/hostname' %}", "loader"), ("{% import 'os' as os %}", "loader"),
     ("{{ range(10**9)|list }}", "ange")],
)  # fmt: skip
def test_escapes(text_bundle: Path, tmp_path: Path, template: str, named: str) -> None:
    text = changed(text_bundle, tmp_path, jinja=template)
    with refused(PromptError, "chat template failed", named, "--prompt-ids"):
        text.prompt("Hi")


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
     ("{{ raise_exception('two\nlines') }}", "two"), ("{{ raise_exception() }}", "argument"),
     ("{% for m in messages %}", "end of template"), ("{{ 1 / 0 }}", "division by zero"),
     ("{{ messages[7].content }}", "no element 7"), ("{{ nothing.at.all }}", "'nothing' is undefined"),
     ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"), ("{{ 'a' * 10**15 }}", "too large"),
     ("{{ messages[0].content + 1 }}", "str")],
)  # fmt: skip
def test_templates_that_fail(text_bundle: Path, tmp_path: Path, template: str, said: str) -> None:
    text = changed(text_bundle, tmp_path, jinja=template)
    with refused(PromptError, "chat template failed", said, "--prompt-ids"):
        text.prompt("Hi")


def test_the_sandbox_lets_common_templates_through(text_bundle: Path, tmp_path: Path) -> None:
    """What published templates use: loops, filters, methods of strings, namespaces, assignments, white space."""
    template = """{%- set ns = namespace(n=0) -%}
    {%- for message in messages -%}
        {%- if loop.index0 == 0 and message['role'] not in ['user', 'system'] -%}
            {{- raise_exception('no') -}}
        {%- endif -%}
        {%- set content = bos_token + message.content | trim if loop.first else message['content'].strip() -%}
        {%- set ns.n = ns.n + 1 -%}
        {{- '<|' ~ message.role ~ '|>' ~ content.replace('x', 'y').upper() ~ ns.n -}}
    {%- endfor -%}
    {%- if add_generation_prompt is defined and add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""
    text = changed(text_bundle, tmp_path, jinja=template)
    ids = text.prompt([{"role": "user", "content": " x "}, {"role": "assistant", "content": "b "}])
    wanted = "<|user|><|STARTOFTEYT|>Y1<|assistant|>B2<|assistant|>"
    assert ids.tolist() == letters(text, wanted)


# Files that cannot be used


def test_without_a_tokenizer(golden: runtime.Runtime) -> None:
    with refused(BundleError, "has no tokenizer.json", "--prompt-ids"):
        golden.generate("Hi", gen_length=4)
    out = golden.generate([1, 2, 3], gen_length=4)
    assert out.text == " ".join(map(str, out.ids)) and len(out.ids) == 4


@pytest.mark.parametrize("content", ["", "{}", "[", '{"model": {"type": "Unknown"}}'])
def test_a_broken_tokenizer(text_bundle: Path, tmp_path: Path, content: str) -> None:
    text = changed(text_bundle, tmp_path, tokenizer=content)
    with refused(BundleError, "tokenizer.json is not a tokenizer", "--prompt-ids"):
        text.prompt("Hi")


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "[" * 100_000])
def test_broken_settings(text_bundle: Path, tmp_path: Path, content: str) -> None:
    text = changed(text_bundle, tmp_path, config=content)
    with refused(BundleError, CONFIG, "not a JSON object", "repair", "build again"):
        text.prompt("Hi")


def test_settings_that_are_no_text(text_bundle: Path, tmp_path: Path) -> None:
    text = changed(text_bundle, tmp_path, jinja=os.fsdecode(b"caf\xe9"))
    with refused(BundleError, JINJA, "cannot be read", "repair", "build again"):
        text.prompt("Hi")


def test_a_template_travels_with_the_checkpoint(text_checkpoint: Path, text_bundle: Path) -> None:
    """The bundle holds what transformers reads from the checkpoint's text files and does not need the checkpoint."""
    assert (text_bundle / "config.json").read_bytes() == (text_checkpoint / "config.json").read_bytes()
    assert (text_bundle / JINJA).read_text() == TEMPLATE
    assert json.loads((text_bundle / CONFIG).read_text())["split_special_tokens"] is False
