"""Commands for a terminal that fetch or convert a checkpoint: the remedies of errors about one.

A command is complete for the folder it is about. Where it depends on something
that is not known, such as the name of the original, the remedy is a sentence.
"""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from export.checkpoint import registry
from export.checkpoint.files import AGAIN

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*"  # organisation/model
HUB = re.compile(rf"(?:(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:/+)?({NAME}?)(?:\.git|/tree/.+|/)?")
BASE = re.compile(rf"^base_model:\s*(?:-\s*)?[\"']?({NAME})", re.MULTILINE)  # of a model card
CARD = 1 << 14  # bytes of a model card that are searched
HEADER = 1 << 16  # bytes of a GGUF file that are searched

MERGE = (
    "import sys, peft, transformers as t; base, adapter, tokenizer, out = sys.argv[1:]; "
    "m = t.AutoModel.from_pretrained(base, torch_dtype='auto', trust_remote_code=True); "
    "peft.PeftModel.from_pretrained(m, adapter).merge_and_unload().save_pretrained(out); "
    "t.AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=True).save_pretrained(out)"
)
WRITE_INDEX = (
    "import json, pathlib, sys; from safetensors import safe_open; d = pathlib.Path(sys.argv[1]); "
    "m = {k: f.name for f in sorted(d.glob('*-of-*.safetensors')) for k in safe_open(f, 'np').keys()}; "
    "(d / sys.argv[2]).write_text(json.dumps({'metadata': {}, 'weight_map': m}))"
)
TO_FP32 = (
    "import pathlib, sys, torch, safetensors.torch as st; "
    "[st.save_file({k: v.float() if v.dtype == torch.float64 else v.clone() for k, v in st.load_file(f).items()}, f) "
    "for f in pathlib.Path(sys.argv[1]).glob('*.safetensors')]"
)
UNPICKLE = (
    "import pathlib, sys, torch, safetensors.torch as st; d = pathlib.Path(sys.argv[1]); "
    "w = [torch.load(d / f, weights_only=True, map_location='cpu') for f in sys.argv[3:]]; "
    "w = {k: v.contiguous().clone() for p in w for k, v in p.get('state_dict', p).items()}; "
    "st.save_file(w, d / sys.argv[2])"
)


def python(code: str, *arguments: str | Path) -> str:
    """The command that runs `code`, which has no double quotes, with `arguments`."""
    return f'python -c "{code}" {shlex.join(map(str, arguments))}'


def download(name: str) -> str:
    """The command that downloads the hub's model `name` to a new folder below the current one."""
    folder = Path(name.split("/")[1])
    if folder.exists():
        folder = folder.with_name(f"{folder.name}-original")
    return f"hf download {name} --local-dir {folder}"


def original(directory: Path, *hints: object, base: str | None = None) -> str:
    """The remedy that fetches what the weights of `directory` were made from.

    Its name is `base`, or in the model card, or a published name that is part of the
    folder's name or of a hint.
    """
    found = base or _base(directory / "README.md") or _published([_name(directory), *map(str, hints)])
    return f"download the original with: {download(found)}" if found else "use the checkpoint that it was made from"


def known(model: str) -> str | None:
    """A folder that is here or a name on the hub, for what another machine called `model`; None if neither is known."""
    return model if Path(model).is_dir() or HUB.fullmatch(model) else _published([model])


def again(directory: Path) -> str:
    """The remedy where files are missing or damaged: a download to the hub's cache or a folder of a published name."""
    name = _name(directory)
    if HUB.fullmatch(name):
        return f"download it again with: hf download {name}"
    found = _published([name])
    if found is None or found.split("/")[1].casefold() != name.casefold():
        return AGAIN
    return f"download it again with: hf download {found} --local-dir {shlex.quote(str(directory))}"


def base_of_gguf(path: Path) -> str | None:
    """The original that a GGUF file's header has the address of; a string there has its length before it."""
    with path.open("rb") as file:
        header = file.read(HEADER)
    found = re.search(rb"(.{8})https://huggingface\.co/", header, re.DOTALL)
    if found is None:
        return None
    start, length = found.end(1), int.from_bytes(found[1], "little")
    name = HUB.fullmatch(header[start : start + length].decode("ascii", "replace"))
    return name[1] if name else None


def _name(directory: Path) -> str:
    """The folder's name; of a snapshot in the hub's cache the model's name on the hub."""
    folder = directory.resolve()
    cached = folder.parents[1].name if folder.parent.name == "snapshots" else ""
    return cached.removeprefix("models--").replace("--", "/", 1) if cached.startswith("models--") else folder.name


def _base(card: Path) -> str | None:
    try:
        found = BASE.search(card.read_bytes()[:CARD].decode("utf-8", "replace"))
    except OSError:
        return None
    return found[1] if found else None


def _published(texts: Iterable[str]) -> str | None:
    """The longest published name whose model is named in one of `texts`."""
    names = [name for family in registry.known() for name in family.published]
    text = "\n".join(texts).casefold()
    found = [name for name in names if name.split("/")[1].casefold() in text]
    return max(found, key=len, default=None)
