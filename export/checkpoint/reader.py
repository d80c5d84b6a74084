"""Reading a checkpoint: strictly when it is opened, part by part after that.

Opening parses config.json and the headers of the safetensors files, and checks
the file, name, shape and type of every tensor. `Checkpoint.part` maps the
tensors of one part and hashes them; the identity of a checkpoint is made of
these hashes. Nothing in a checkpoint is executed or unpickled.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engines.config import ModelConfig
from engines.errors import CheckpointError
from export.checkpoint import Family, pickled, tokenizer
from export.checkpoint.generation import decoding_defaults
from export.checkpoint.registry import find_family
from export.checkpoint.tokenizer import AGAIN, GENERATION, special_id

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")
CHUNK = 1 << 22  # elements hashed at a time


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, from `open_checkpoint`; holds no tensor and no open file."""

    directory: Path
    config: ModelConfig
    family: Family = field(repr=False)
    shards: dict[str, Path] = field(repr=False)  # tensor -> the file that holds it
    digests: dict[str, str] = field(default_factory=dict, repr=False, compare=False)  # of the tensors read so far

    @property
    def identity(self) -> str:
        """SHA-256 (hex) over config.json and the content of every tensor that a part reads.

        The files that hold the tensors do not count. Parts that `part` has not read
        yet are read for it.
        """
        config = hashlib.sha256(_content(self.directory / "config.json")).hexdigest()
        found = [config, *(self.digest(part) for part in (*self.config.parts, *self.config.vision_parts))]
        return hashlib.sha256("\n".join(found).encode()).hexdigest()

    def digest(self, part: str) -> str:
        """SHA-256 (hex) over the names, types, shapes and content of a part's tensors; reads the part at first use."""
        weights = self.family.weights(self.config, part)
        if any(weight.tensor not in self.digests for weight in weights.values()):
            self.part(part)
        lines = [f"{local} {weight} {self.digests[weight.tensor]}" for local, weight in weights.items()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def texts(self) -> dict[str, bytes]:
        """The files of a bundle that are texts: config.json, generation_config.json, and those of the tokenizer.

        Raises CheckpointError and BackendError as `export.checkpoint.tokenizer.canonical`.
        """
        copied = [path for name in ("config.json", GENERATION) if (path := self.directory / name).is_file()]
        made = tokenizer.canonical(self.directory, self.family, self.config)
        return {path.name: _content(path) for path in copied} | made

    def decoding(self) -> dict[str, Any]:
        """The checkpoint's decoding defaults; see `export.checkpoint.generation`."""
        return decoding_defaults(self.directory, self.family)

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """Read the tensors of one part: local name -> tensor in the stored type, matrices as [in, out] views.

        They are mapped from the file, not copied, and hashed. Raises CheckpointError
        for an unknown part, a file that can no longer be read or that has changed since
        an earlier read, or a NaN or Inf.
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
        for tensor, values in stored.items():
            found = _digest(values, tensor, name)
            if self.digests.setdefault(tensor, found) != found:
                raise CheckpointError(
                    f"{self.shards[tensor]} changed while it was read ({tensor}); run the build again"
                )
        return {
            local: stored[weight.tensor].flatten(1).t() if weight.transposed else stored[weight.tensor]
            for local, weight in weights.items()
        }


def is_finite(values: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf; needs no temporary."""
    low, high = torch.aminmax(values)  # a NaN anywhere makes both NaN
    return math.isfinite(low) and math.isfinite(high)


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
    return Checkpoint(directory=directory, config=config, family=family, shards=shards)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; give a complete Hugging Face checkpoint folder") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_content(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object; {AGAIN}")
    return content


def _index(directory: Path) -> dict[str, str]:
    """Tensor -> file name, from the index; empty for a checkpoint of one file, which has no index."""
    single, index = (directory / SINGLE).is_file(), (directory / INDEX).is_file()
    if single and index:
        raise CheckpointError(f"{directory} holds both {SINGLE} and {INDEX}; remove the one that is out of date")
    if single:
        return {}
    if not index:
        raise CheckpointError(
            pickled.refusal(directory, SINGLE) or f"{directory} holds neither {SINGLE} nor {INDEX}; {AGAIN}"
        )
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


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    """The opened safetensors file `path`; the library's errors become CheckpointErrors that name the file.

    "np" maps the file read-only, enough for headers. "pt" also reads bfloat16, but
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
    """Raise CheckpointError unless the tensors are those of all parts, each with its shape and a known type."""
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


def _digest(values: torch.Tensor, name: str, part: str) -> str:
    """Type and SHA-256 (hex) of a tensor as stored; raises CheckpointError for NaN or Inf. Reads it once."""
    digest = hashlib.sha256()
    for chunk in torch.split(values.reshape(-1), CHUNK):
        if not is_finite(chunk):
            raise CheckpointError(f"{name} of part {part} holds NaN or Inf, expected finite numbers; {AGAIN}")
        digest.update(chunk.view(torch.uint8).numpy().data)
    return f"{values.dtype} {digest.hexdigest()}"
