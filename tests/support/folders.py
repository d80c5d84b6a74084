"""Folders with a tokenizer, bent in the ways in which checkpoints are published or left by training scripts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, EOT, MASK, HEADER, END = SPECIAL = (
    "<|startoftext|>", "<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>",
)  # fmt: skip
SAYINGS = ["It's 2026, isn't it? the three men", "naïve  café\n\n  12345 don't", "the cat and the hat", "日本語\r\n \t"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
BODY = "{{ message.content | trim }}"
FIRST = 320  # id of the first special token
CODE = {"tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
Change = Callable[[Path], None]


def write_folder(folder: Path) -> None:
    """A byte-level BPE with merges, a template, and the tokens of `SPECIAL`, ids from `FIRST` on."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    pieces = [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(SAYINGS * 9, trainers.BpeTrainer(vocab_size=FIRST, initial_alphabet=alphabet))
    tokenizer.add_tokens([f"<filler {n}>" for n in range(FIRST - tokenizer.get_vocab_size())])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "chat_template": TEMPLATE}
    write(folder, "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    write(folder, "config.json", {"model_type": "llada", "architectures": ["LLaDAModelLM"], "pad_token_id": FIRST + 1})


def write(folder: Path, name: str, content: Any) -> None:
    """A JSON file of a folder."""
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    """Changes a JSON file of a folder."""

    def do(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        write(folder, name, content)

    return do


def tokenizer(**parts: Any) -> Change:
    """Replaces parts of tokenizer.json."""
    return edit("tokenizer.json", lambda content: content.update(parts))


def settings(*dropped: str, **values: Any) -> Change:
    """Drops and sets keys of tokenizer_config.json."""

    def change(content: dict[str, Any]) -> None:
        for key in dropped:
            content.pop(key, None)
        content.update(values)

    return edit("tokenizer_config.json", change)


def template(body: str, before: str = "") -> Change:
    """The template with another body of a message, and something before it."""
    return settings(chat_template=before + TEMPLATE.replace(BODY, body))


def file(name: str, content: Any) -> Change:
    """Adds a file, JSON unless `content` is text."""

    def do(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_bytes(text.encode("utf-8"))

    return do


def without(*texts: str) -> Change:
    """Leaves added tokens out of tokenizer.json, as one that was not saved again lacks them."""

    def change(content: dict[str, Any]) -> None:
        content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] not in texts]

    return edit("tokenizer.json", change)


def flags(text: str, **values: bool) -> Change:
    """Changes the flags of an added token of tokenizer.json."""

    def change(content: dict[str, Any]) -> None:
        (one,) = (one for one in content["added_tokens"] if one["content"] == text)
        one.update(values)

    return edit("tokenizer.json", change)


def decoder(**values: bool) -> dict[str, dict[str, Any]]:
    """An added_tokens_decoder of `SPECIAL`."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True} | values
    return {str(FIRST + number): {"content": text} | flags for number, text in enumerate(SPECIAL)}


def around(*pieces: str) -> dict[str, Any]:
    """A post-processor that puts special tokens around a text, "A" among `pieces`."""
    ids = {text: FIRST + SPECIAL.index(text) for text in pieces if text != "A"}
    single = [{"Sequence" if piece == "A" else "SpecialToken": {"id": piece, "type_id": 0}} for piece in pieces]
    special = {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in ids.items()}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def pair(folder: Path) -> None:
    """vocab.json and merges.txt in place of tokenizer.json, added tokens in tokenizer_config.json."""
    Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {str(one.pop("id")): one for one in content["added_tokens"]}
    settings(added_tokens_decoder=added)(folder)
    (folder / "tokenizer.json").unlink()


def bom(*names: str) -> Change:
    """Puts a byte order mark in front of files."""

    def do(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())

    return do


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


PADDING = {
    "strategy": {"Fixed": 48}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": FIRST + 1, "pad_type_id": 0,
    "pad_token": EOS,
}  # fmt: skip
TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
SPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
OTHER = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}!")
CONDITIONAL = (
    "{% if message.role == 'user' %}{{ message.content }}{% else %}{% generation %}{{ message.content }}"
    "{% endgeneration %}{% endif %}"
)

# The ways, by name; transformers reads all of them. What it does not read as a bundle does is in the tests.
WAYS: dict[str, tuple[Change, ...]] = {
    "plain": (),
    "truncation": (tokenizer(truncation=TRUNCATION),),
    "padding": (tokenizer(padding=PADDING),),
    "padding on the right": (tokenizer(padding=PADDING | {"direction": "Right", "pad_to_multiple_of": 16}),),
    "truncation and padding": (tokenizer(truncation=TRUNCATION, padding=PADDING),),
    "padding of batches": (tokenizer(padding=PADDING | {"strategy": "BatchLongest"}),),
    "small model_max_length": (settings(model_max_length=8, truncation_side="left", padding_side="left"),),
    "generation tag": (template(CONDITIONAL),),
    "date": (template(BODY, "{{ strftime_now('%Y') }}"),),
    "date if defined": (template(BODY, "{{ strftime_now('%Y') if strftime_now is defined else 'no' }}"),),
    "tojson": (template("{{ message.content | tojson }}"),),
    "tojson of a message": (template("{{ message | tojson(indent=2, ensure_ascii=True) }}"),),
    "tojson, separators": (template("{{ message | tojson(separators=(',', ':'), sort_keys=True) }}"),),
    "break and continue": (
        template("{% for c in message.content %}{% if c == '&' %}{% continue %}{% endif %}"
                 "{% if loop.index > 9 %}{% break %}{% endif %}{{ c }}{% endfor %}"),
    ),
    "raise_exception": (template("{% if message.role == 'tool' %}{{ raise_exception('no') }}{% endif %}" + BODY),),
    "tools and documents": (template(BODY, "{% if tools is none and documents is none %}a{% endif %}{{ tools }}"),),
    "macro and namespace": (
        template("{{ say(message.content) }}",
                 "{% set ns = namespace(n=0) %}{% macro say(t) %}{{ ns.n }}{{ t }}{% endmacro %}"),
    ),
    "white space control": (template("\n  {%- if true %}\n  {{- message.content }}\n  {% endif %}\n"),),
    "parts or text": (
        template("{% if message.content is string %}{{ message.content }}{% else %}"
                 "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"),
    ),
    "chat_template.jinja before the settings": (file("chat_template.jinja", OTHER),),
    "chat_template.jinja alone": (settings("chat_template"), file("chat_template.jinja", TEMPLATE)),
    "chat_template.jinja with CR LF": (file("chat_template.jinja", OTHER.replace("}}", "}}\r\n")),),
    "list with a default": (settings(chat_template=named(rag="x", default=OTHER)),),
    "object with a default": (settings(chat_template={"default": OTHER, "rag": "x"}),),
    "additional templates": (
        file("chat_template.jinja", OTHER), file("additional_chat_templates/rag.jinja", "x"),
    ),
    "template in two places": (file("chat_template.json", {"chat_template": OTHER}),),
    "tokens in added_tokens_decoder": (without(EOT, MASK, HEADER, END), settings(added_tokens_decoder=decoder())),
    "tokens in added_tokens.json": (
        without(EOT, MASK, HEADER, END), file("added_tokens.json", {t: FIRST + n for n, t in enumerate(SPECIAL)}),
    ),
    "tokens in both": (
        without(HEADER, END), settings(added_tokens_decoder=decoder()), file("added_tokens.json", {END: FIRST + 5}),
    ),
    "names in special_tokens_map.json": (
        settings("bos_token", "eos_token", "pad_token"),
        file("special_tokens_map.json", {"bos_token": BOS, "eos_token": EOS}),
    ),
    "objects in special_tokens_map.json": (
        settings("bos_token"),
        file("special_tokens_map.json", {"bos_token": {"content": BOS, "lstrip": False, "rstrip": True}}),
    ),
    "another name in special_tokens_map.json": (file("special_tokens_map.json", {"bos_token": EOT}),),
    "additional_special_tokens in the map": (
        without(HEADER), file("special_tokens_map.json", {"additional_special_tokens": [HEADER, END]}),
    ),
    "extra_special_tokens, a list": (without(END), settings(extra_special_tokens=[HEADER, END])),
    "extra_special_tokens, names": (
        without(END), settings(extra_special_tokens={"end_token": END}), template("{{ end_token }}" + BODY),
    ),
    "additional_special_tokens": (without(END), settings(additional_special_tokens=[END])),
    "token of the model's own": (settings(image_token="<image>"), template("{{ image_token }}" + BODY)),
    "flags: lstrip": (settings(added_tokens_decoder=decoder(lstrip=True)),),
    "flags: rstrip": (settings(added_tokens_decoder=decoder(rstrip=True)),),
    "flags: single_word": (settings(added_tokens_decoder=decoder(single_word=True)),),
    "flags: normalized": (
        settings(added_tokens_decoder=decoder(normalized=True)), tokenizer(normalizer={"type": "Lowercase"}),
    ),
    "flags: not special": (settings(added_tokens_decoder=decoder(special=False)),),
    "flags in tokenizer.json": (flags(EOT, lstrip=True, rstrip=True), flags(END, special=False)),
    "BOS, an object": (settings(bos_token={"__type": "AddedToken", "content": BOS, "special": True, "lstrip": True}),),
    "BOS, null": (settings(bos_token=None),),
    "pad_token that is new": (settings(pad_token="[PAD]"),),
    "BOS by the post-processor": (tokenizer(post_processor=around(BOS, "A")), settings("chat_template")),
    "BOS and EOS by the post-processor": (tokenizer(post_processor=around(BOS, "A", EOS)), settings("chat_template")),
    "BOS by both": (tokenizer(post_processor=around(BOS, "A")),),
    "base without settings": (lambda folder: (folder / "tokenizer_config.json").unlink(),),
    "add_bos_token": (settings("chat_template", add_bos_token=True),),
    "add_bos_token, two files": (
        pair, settings("chat_template", tokenizer_class="GPT2Tokenizer", add_bos_token=True, unk_token=EOS),
    ),
    "two files of Qwen2": (pair, settings(tokenizer_class="Qwen2Tokenizer")),
    "two files of GPT2": (pair, settings(tokenizer_class="GPT2Tokenizer", unk_token=EOS)),
    "class Qwen2TokenizerFast": (settings(tokenizer_class="Qwen2TokenizerFast"),),
    "class LlamaTokenizerFast": (settings(tokenizer_class="LlamaTokenizerFast"),),
    "class TokenizersBackend": (settings(tokenizer_class="TokenizersBackend"),),
    "no class": (settings("tokenizer_class"),),
    "class that is known beside code": (settings(auto_map={"AutoTokenizer": ["tokenization_x.X", None]}),),
    "split_special_tokens": (settings(split_special_tokens=True),),
    "clean_up_tokenization_spaces": (settings(clean_up_tokenization_spaces=True),),
    "lower case": (tokenizer(normalizer={"type": "Lowercase"}),),
    "NFC": (tokenizer(normalizer={"type": "NFC"}),),
    "prefix space": (
        tokenizer(pre_tokenizer=BYTES),
    ),
    "metaspace": (tokenizer(pre_tokenizer=SPACE, decoder=SPACE),),
}  # fmt: skip
