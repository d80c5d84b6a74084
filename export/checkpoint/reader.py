"""Reading a checkpoint: strictly when it is opened, lazily part by part.

Opening parses config.json and the headers of the safetensors files, and checks
every tensor's place, name, shape and type; the numbers are read when a part is
asked for. Nothing in a checkpoint is executed or unpickled. Nothing here knows
the keys of a config, the names of a family's weights, or what a part computes.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engines.config import ModelConfig
from engines.errors import CheckpointError
from export.checkpoint import Family
from export.checkpoint.registry import find_family
from export.checkpoint.tokenizer import AGAIN, FILES, PAIRS, needs_writing, special_id

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")
SCHEDULE = "alg", "alg_temp", "eps"  # of generation_config.json itself, where a published driver reads them
DECODING = (  # what a checkpoint may set for the policy elastic
    "threshold", "gamma", "drift", "track_num", "window", "max_masks", "window_span", "block_caching", "refresh_scope",
)  # fmt: skip
WINDOW: dict[str, Any] = {"window": 16}  # where a family names none
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; `open_checkpoint` makes it. Holds no tensor and no open file."""

    directory: Path
    config: ModelConfig
    family: Family = field(repr=False)
    shards: dict[str, Path] = field(repr=False)  # tensor -> the file that holds it

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) over names, sizes and content of config.json and the weight files; reads them all."""
        digest = hashlib.sha256()
        for path in (self.directory / "config.json", *sorted(set(self.shards.values()))):
            try:
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
                with path.open("rb") as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from error
        return digest.hexdigest()

    def tokenizer_files(self) -> list[Path]:
        """The files of the tokenizer and the generation defaults that the checkpoint has."""
        pairs = () if needs_writing(self.directory) else PAIRS
        return [p for name in FILES if (p := self.directory / name).is_file() and name not in pairs]

    def decoding(self) -> dict[str, Any]:
        """How the checkpoint wants to be decoded: generation_config.json over its family's defaults.

        Read are `elastic`, and the keys of a schedule of time steps beside it.

        Raises CheckpointError for a file that is no JSON object, or an option nobody knows.
        """
        path = self.directory / "generation_config.json"
        if not path.is_file():
            return WINDOW | dict(self.family.decoding)
        try:
            content = json.loads(path.read_text())
            found = dict(content.get("elastic", {}))
            unknown = sorted(set(found) - set(DECODING))
            found |= {name: content[name] for name in SCHEDULE if content.get(name) is not None}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path} is no JSON object of generation defaults ({error}); {AGAIN}") from error
        if unknown:
            raise CheckpointError(f"{path}: elastic has unknown options {unknown}; they are {', '.join(DECODING)}")
        return WINDOW | dict(self.family.decoding) | found

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one part by local name, in the stored type; matrices as [in, out] views.

        They are mapped from the file, not copied. Raises CheckpointError for an
        unknown part, a file that can no longer be read, or a NaN or Inf.
        """
        if name not in (*self.config.parts, *self.config.vision_parts):
            listed = f"{', '.join(self.config.parts[:2])} … {self.config.parts[-1]}"
            raise CheckpointError(f"{self.directory} has no part {name!r}; its parts are {listed}")
        weights = self.family.weights(self.config, name)
        stored: dict[str, torch.Tensor] = {}
        for path in sorted({self.shards[weight.tensor] for weight in weights.values()}):
            here = [weight.tensor for weight in weights.values() if self.shards[weight.tensor] == path]
            with _opened(path, "pt") as file:
                stored |= {tensor: file.get_tensor(tensor) for tensor in here}
        for weight in weights.values():
            _check_finite(stored[weight.tensor], weight.tensor, name)
        return {
            local: stored[weight.tensor].flatten(1).t() if weight.transposed else stored[weight.tensor]
            for local, weight in weights.items()
        }


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a Hugging Face directory, reading headers only; raises CheckpointError for anything unexpected."""
    directory = Path(directory)
    if not os.path.isdir(directory):
        raise CheckpointError(f"{directory} is not a directory; give the folder that holds config.json")
    raw = _json_object(directory / "config.json")
    family = find_family(raw)
    config = replace(
        family.read_config(family.complete(directory, raw)), eot_id=special_id(directory, family.end_of_turn)
    )
    index = _index(directory)
    shards: dict[str, Path] = {}
    headers: dict[str, tuple[tuple[int, ...], str]] = {}  # tensor -> shape, type
    for path in sorted({directory / file for file in index.values()} or {directory / SINGLE}):
        with _opened(path, "np") as file:
            for tensor in file.keys():  # noqa: SIM118 (not a dictionary)
                if index and index.get(tensor) != path.name:
                    raise CheckpointError(f"{path} holds {tensor}, which {INDEX} does not place there; {AGAIN}")
                header = file.get_slice(tensor)
                shards[tensor], headers[tensor] = path, (tuple(header.get_shape()), header.get_dtype())
    for tensor, shard in index.items():
        if tensor not in shards:
            raise CheckpointError(f"{directory / INDEX} places {tensor} in {shard}, which does not hold it; {AGAIN}")
    _check_tensors(directory, family, config, headers)
    return Checkpoint(directory, config, family, shards)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; give a complete Hugging Face checkpoint folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object; {AGAIN}")
    return content


def _index(directory: Path) -> dict[str, str]:
    """Tensor -> file name, as the index has it; empty for a checkpoint of one file, which needs none."""
    single, index = (directory / SINGLE).is_file(), (directory / INDEX).is_file()
    if single and index:
        raise CheckpointError(f"{directory} holds both {SINGLE} and {INDEX}; remove the one that is out of date")
    if single:
        return {}
    if not index:
        raise CheckpointError(_no_weights(directory))
    places = _json_object(directory / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{directory / INDEX} has no weight_map of tensor names to files; {AGAIN}")
    for tensor, shard in places.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{directory / INDEX} places {tensor} in {json.dumps(shard)}, expected a .safetensors file beside it; "
                f"{AGAIN}"
            )
    return places


def _no_weights(directory: Path) -> str:
    """Why there is nothing to read; for pickled weights, with the command that converts them."""
    for pattern in PICKLES:
        if any(directory.glob(pattern)):
            code = (
                "import sys, pathlib, torch, safetensors.torch as st; d = pathlib.Path(sys.argv[1]); "
                f"w = [torch.load(f, weights_only=True, map_location='cpu') for f in sorted(d.glob('{pattern}'))]; "
                f"st.save_file({{k: v.contiguous().clone() for p in w for k, v in p.items()}}, d / '{SINGLE}')"
            )
            return (
                f"{directory} holds pickled weights ({pattern}), which can run code and are never opened here; "
                f'convert them with: python -c "{code}" {shlex.quote(str(directory))}'
            )
    return f"{directory} holds neither {SINGLE} nor {INDEX}; {AGAIN}"


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    """The safetensors file at `path`; foreign errors become CheckpointErrors that name it.

    "np" maps the file read-only and serves for headers. "pt" also reads bfloat16, but
    its mapping is writable: the system refuses a file larger than the machine's memory.
    """
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing, though the checkpoint needs it; {AGAIN}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); {AGAIN}") from error
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be mapped ({error}); save the weights in smaller shards") from error


def _check_tensors(
    directory: Path, family: Family, config: ModelConfig, headers: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    """Every weight of every part is there with its shape and a known type, and nothing else is."""
    if config.layers + (config.vision.layers if config.vision else 0) > len(headers):
        raise CheckpointError(
            f"{directory} holds {len(headers)} tensors, too few for the {config.layers} layers of config.json; {AGAIN}"
        )
    parts = (*config.parts, *config.vision_parts)
    needed = {weight.tensor for part in parts for weight in family.weights(config, part).values()}
    for part in parts:
        for tensor, shape, _ in family.weights(config, part).values():
            if tensor not in headers:
                raise CheckpointError(f"{directory} lacks {tensor} {list(shape)} of part {part}; {AGAIN}")
            came, dtype = headers[tensor]
            if came != shape:
                raise CheckpointError(
                    f"{tensor} of part {part} has shape {list(came)}, expected {list(shape)} by config.json; "
                    "use the config.json that belongs to these weights"
                )
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{tensor} of part {part} is stored as {dtype}, expected one of {', '.join(DTYPES)}; "
                    "use the checkpoint that is not quantised, or convert it"
                )
    superfluous = [t for t in headers if t not in needed and not any(fnmatchcase(t, p) for p in family.ignorable)]
    if superfluous:
        raise CheckpointError(
            f"{directory} holds {len(superfluous)} tensors that the model described by config.json does not have, "
            f"first {min(superfluous)}; use the config.json that belongs to these weights"
        )


def _check_finite(tensor: torch.Tensor, name: str, part: str) -> None:
    low, high = torch.aminmax(tensor)  # one pass and no temporary; a NaN anywhere makes both NaN
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise CheckpointError(f"{name} of part {part} holds NaN or Inf, expected finite numbers; {AGAIN}")
