"""What a path, a folder or a set of weights is when it is no checkpoint of the kind that is read.

Recognised by file names, first bytes, keys of config.json, and names and types
of tensors. Each is named for what it is, with the command that fetches or
converts it. Nothing is executed or unpickled: of a pickled file, no more than the
first bytes are looked at.
"""

import json
import os
import re
import shlex
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from engines.bundle import MANIFEST
from engines.errors import CheckpointError
from export.checkpoint import commands
from export.checkpoint.commands import again, download, original, python

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
READ = (".json", ".jinja", ".txt", ".safetensors")  # suffixes of the files that a build may read
PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin")
NO_WEIGHTS = ("optimizer.*", "scheduler.*", "rng_state*", "training_args.bin", "scaler.pt", "adapter_model*")
OTHERS = {"*.h5": "TensorFlow", "*.msgpack": "Flax", "*.onnx": "ONNX", "*.npz": "NumPy", "*.distcp": "PyTorch's DCP"}
SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.safetensors")
METHODS = {  # shell patterns of tensors that only a method's quantised weights have, the most telling first
    "*.g_idx": "GPTQ", "*.qzeros": "AWQ or GPTQ", "*.qweight": "AWQ or GPTQ", "*.SCB": "bitsandbytes in 8 bits",
    "*.quant_state.*": "bitsandbytes in 4 bits", "*.absmax": "bitsandbytes in 4 bits",
    "*.weight_packed": "compressed-tensors", "*_scale_inv": "fp8", "*.weight_scale*": "fp8 or compressed-tensors",
    "*.input_scale": "fp8",
}  # fmt: skip
SPELLED = {"gptq": "GPTQ", "awq": "AWQ"}
UNMERGED = ("*.lora_*", "*.base_layer.*", "*.modules_to_save.*", "*.original_module.*")


def check_path(given: str | Path) -> None:
    """Raise CheckpointError unless `given` is a folder."""
    path, hub = Path(given), commands.HUB.fullmatch(str(given))
    if os.path.isdir(path):
        return
    if os.path.isfile(path) and _starts(path, b"GGUF"):
        raise CheckpointError(_gguf(path.parent, path))
    if os.path.isfile(path) and (path.parent / "config.json").is_file():
        raise CheckpointError(f"{path} is a file, expected a checkpoint's folder; use {shlex.quote(str(path.parent))}")
    if hub and not os.path.exists(path) and (hub[1] != str(given) or not os.path.isdir(path.parent)):
        raise CheckpointError(
            f"{given} is not a directory, and a build downloads nothing; if it is a name on the Hugging Face hub, "
            f"download it with: {download(hub[1])}"
        )
    raise CheckpointError(f"{path} is not a directory; give the folder that holds config.json")


def check_files(directory: Path) -> None:
    """Raise CheckpointError for a file that stands for another: a pointer of Git LFS or a web page."""
    try:
        paths = sorted(directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read ({error.strerror}); give a folder that can be") from error
    for path in paths:
        if path.suffix in READ and os.path.isfile(path):
            _check_file(directory, path)


def check_adapter(directory: Path) -> None:
    """Raise CheckpointError for a folder of an adapter."""
    if not (directory / ADAPTER).is_file():
        return
    if any((directory / name).is_file() for name in (SINGLE, INDEX)):
        raise CheckpointError(
            f"{directory} holds an adapter ({ADAPTER}) beside a model's weights, and no adapter is applied; "
            "remove the adapter's files if it is merged into the weights, or move them to a folder of their own"
        )
    try:
        settings = json.loads((directory / ADAPTER).read_text(encoding="utf-8"))
        kind, base = (_word(settings.get(key)) for key in ("peft_type", "base_model_name_or_path"))
    except (OSError, ValueError, AttributeError, RecursionError):
        kind, base = None, None
    named = f"{directory} holds {'an' if kind is None else f'a {kind}'} adapter alone ({ADAPTER}), expected a model"
    if kind and ("TUNING" in kind or "PROMPT" in kind):
        raise CheckpointError(f"{named}; this kind of adapter cannot be merged into one, so train another kind")
    model = commands.known(base) if base else None
    if model is None:
        raise CheckpointError(f"{named}; merge it into {base or 'the model that it was trained on'} with peft")
    tokenizer = directory if (directory / "tokenizer_config.json").is_file() else model
    command = python(commands.MERGE, model, directory, tokenizer, f"{directory.resolve().name}-merged")
    raise CheckpointError(
        f"{named}; merge it, where peft and transformers are installed, into {model}, whose own code this runs, with: "
        f"{command}"
    )


def check_config(directory: Path, raw: dict[str, Any]) -> None:
    """Raise CheckpointError for a config.json of quantised weights."""
    settings = raw.get("quantization_config") or raw.get("compression_config") or raw.get("quantization")
    if settings:
        raise CheckpointError(quantised(directory, _method(settings), raw.get("_name_or_path")))


def check_tensors(directory: Path, headers: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Raise CheckpointError for quantised weights and unmerged adapters, by names and types of their tensors."""
    method = next((method for pattern, method in METHODS.items() if _first(headers, pattern)), None)
    if method is None and any(dtype.startswith(("F8_", "F6_", "F4")) for _, dtype in headers.values()):
        method = "fp8"
    if method is not None:
        raise CheckpointError(quantised(directory, method))
    unmerged = next((name for pattern in UNMERGED if (name := _first(headers, pattern))), None)
    if unmerged:
        raise CheckpointError(
            f"{directory} holds tensors of an adapter that is not merged into the weights, first {unmerged}; "
            "save the model again after peft's merge_and_unload()"
        )


def quantised(directory: Path, method: str, *hints: object) -> str:
    """The error about weights that are quantised by `method`."""
    return (
        f"{directory} holds weights that are quantised with {method}, expected fp32, fp16 or bf16; "
        f"{original(directory, *hints)}"
    )


def no_config(directory: Path) -> str:
    """The error about a folder without config.json."""
    missing = f"{directory / 'config.json'} is missing"
    snapshots = _checkpoints(directory / "snapshots")
    if snapshots:
        found = shlex.quote(str(_current(directory, snapshots)))
        return f"{missing}: this is a hub's cache, which keeps the checkpoint further down; use {found}"
    ggufs = sorted(directory.glob("*.gguf"))
    if ggufs:
        return _gguf(directory, ggufs[0])
    below = _checkpoints(directory)
    if below:
        names = ", ".join(path.name for path in below)
        return f"{missing}, but there is a checkpoint in {names}; use {shlex.quote(str(below[-1]))}"
    return f"{missing}; give a complete Hugging Face checkpoint folder"


def no_weights(directory: Path) -> str:
    """The error about a folder with a config.json, and neither `SINGLE` nor `INDEX`."""
    found = sorted(path for path in directory.glob("*.safetensors") if not _is_other(path))
    shards = {int(match[1]): int(match[2]) for path in found if (match := SHARD.fullmatch(path.name))}
    lacks = f"{directory} has neither {SINGLE} nor {INDEX}"
    if len(found) == 1 and set(shards.items()) <= {(1, 1)}:
        command = f"mv {shlex.quote(str(found[0]))} {shlex.quote(str(directory / SINGLE))}"
        return f"{lacks}, but a single file {found[0].name}; rename it with: {command}"
    if shards:
        count = max(shards.values())
        missing = [str(number) for number in range(1, count + 1) if number not in shards]
        if missing:
            return f"{lacks}, and of {count} shards {', '.join(missing)} are missing; {again(directory)}"
        return (
            f"{lacks}, but all {count} shards; write the index with: {python(commands.WRITE_INDEX, directory, INDEX)}"
        )
    if found:
        return f"{lacks}, but {', '.join(path.name for path in found)}; name the file that holds the model {SINGLE}"
    if (directory / MANIFEST).is_file():
        return f"{directory} is a bundle, expected a checkpoint; give the folder that the bundle was built from"
    ggufs = sorted(directory.glob("*.gguf"))
    return (_gguf(directory, ggufs[0]) if ggufs else None) or _pickled(directory) or _other(directory, lacks)


def _checkpoints(directory: Path) -> list[Path]:
    """The folders in `directory` that have a config.json and weights, the newest last."""
    found = [path.parent for name in (SINGLE, INDEX) for path in directory.glob(f"*/{name}")]
    found = [folder for folder in found if (folder / "config.json").is_file()]
    return sorted(found, key=lambda folder: (folder.stat().st_mtime, folder.name))


def _current(cache: Path, snapshots: list[Path]) -> Path:
    """The snapshot that the cache's main branch is at, or the newest."""
    try:
        main = (cache / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    return next((folder for folder in snapshots if folder.name == main), snapshots[-1])


def _check_file(directory: Path, path: Path) -> None:
    if _starts(path, b"version https://git-lfs.github.com/spec/"):
        pull = f"fetch the files with: git -C {shlex.quote(str(directory))} lfs pull"
        remedy = pull if (directory / ".git").exists() else again(directory)
        raise CheckpointError(f"{path} is a Git LFS pointer, a few lines in place of the file; {remedy}")
    if path.suffix in (".json", ".safetensors") and _starts(path, b"<!doctype html", b"<html"):
        raise CheckpointError(f"{path} is a web page, saved in place of the file; {again(directory)}")


def _starts(path: Path, *beginnings: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip().lower().startswith(tuple(start.lower() for start in beginnings))
    except OSError:
        return False  # whoever reads the file says so


def _first(names: Iterable[str], pattern: str) -> str | None:
    return min((name for name in names if fnmatchcase(name, pattern)), default=None)


def _is_other(path: Path) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in NO_WEIGHTS)


def _word(value: Any) -> str | None:
    """A text of a checkpoint that a message may repeat; None for another value."""
    return value if isinstance(value, str) and value and value.isprintable() else None


def _method(settings: Any) -> str:
    """The name of the method in a config's settings of quantised weights."""
    if not isinstance(settings, dict):
        return "an unknown method"
    bits = next((n for n in (4, 8) if settings.get(f"load_in_{n}bit")), settings.get("bits"))
    loads = any(key.removeprefix("_").startswith("load_in_") for key in settings)
    method = _word(settings.get("quant_method")) or ("bitsandbytes" if loads else "an unnamed method")
    return SPELLED.get(method, method) + (f" in {bits} bits" if type(bits) is int else "")


def _gguf(directory: Path, path: Path) -> str:
    remedy = original(directory, path.name, base=commands.base_of_gguf(path))
    return f"{path} is a GGUF file, for llama.cpp, expected a folder of safetensors; {remedy}"


def _pickled(directory: Path) -> str | None:
    """The error with the command that converts pickled weights, recognised by their file names; None without any."""
    for pattern in PICKLED:
        files = [path for path in directory.glob(pattern) if not _is_other(path)]
        for path in files:
            _check_file(directory, path)
        if files:
            names = sorted(path.name for path in files)
            return (
                f"{directory} holds pickled weights ({pattern}), which can run code and are never loaded; "
                f"convert them with: {python(commands.UNPICKLE, directory, SINGLE, *names)}"
            )
    return None


def _other(directory: Path, lacks: str) -> str:
    for pattern, kind in OTHERS.items():
        if any(directory.glob(pattern)):
            return f"{lacks}, but weights of {kind} ({pattern}); save the model with save_pretrained()"
    return f"{directory} holds neither {SINGLE} nor {INDEX}; {again(directory)}"
