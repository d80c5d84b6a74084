"""Reading a checkpoint: strictly when it is opened, part by part after that.

Opening parses config.json and the headers of the safetensors files, and checks
the file, name, shape and type of every tensor (`export.checkpoint.tensors`); of
their content it reads only a head that is saved twice, to compare the two. What
is no checkpoint is named for what it is (`export.checkpoint.foreign`).
`Checkpoint.part` maps the tensors of one part and hashes them; the identity of a
checkpoint is made of these hashes. Nothing in a checkpoint is executed or
unpickled.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engines.config import ModelConfig
from engines.errors import CheckpointError
from engines.files import check_access
from export.checkpoint import Family, Weight, ends, foreign, ids, tensors, tokenizer
from export.checkpoint.commands import again
from export.checkpoint.files import AGAIN, json_object, read_bytes
from export.checkpoint.foreign import INDEX as INDEX
from export.checkpoint.foreign import SINGLE as SINGLE
from export.checkpoint.generation import decoding_defaults
from export.checkpoint.registry import find_family
from export.checkpoint.tokenizer import GENERATION

CHUNK = 1 << 22  # elements hashed at a time


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, from `open_checkpoint`; holds no tensor and no open file."""

    directory: Path
    config: ModelConfig
    family: Family = field(repr=False)
    names: dict[str, str] = field(repr=False)  # tensor, as the family names it -> as it is stored
    shards: dict[str, Path] = field(repr=False)  # tensor, as it is stored -> the file that holds it
    digests: dict[str, str] = field(default_factory=dict, repr=False, compare=False)  # of the tensors read so far

    @property
    def identity(self) -> str:
        """SHA-256 (hex) over config.json and the content of every tensor that a part reads.

        The files that hold the tensors do not count. Parts that `part` has not read
        yet are read for it.
        """
        config = hashlib.sha256(read_bytes(self.directory / "config.json")).hexdigest()
        found = [config, *(self.digest(part) for part in (*self.config.parts, *self.config.vision_parts))]
        return hashlib.sha256("\n".join(found).encode()).hexdigest()

    def digest(self, part: str) -> str:
        """SHA-256 (hex) over the names, types, shapes and content of a part's tensors; reads the part at first use."""
        weights = self.family.weights(self.config, part)
        if any(tensor not in self.digests for weight in weights.values() for tensor in weight.tensors):
            self.part(part)
        lines = [
            f"{local} {weight} {' '.join(self.digests[tensor] for tensor in weight.tensors)}"
            for local, weight in weights.items()
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def texts(self) -> dict[str, bytes]:
        """The files of a bundle that are texts: config.json, generation_config.json, and those of the tokenizer.

        Raises CheckpointError and BackendError as `export.checkpoint.tokenizer.canonical`.
        """
        copied = [path for name in ("config.json", GENERATION) if (path := self.directory / name).is_file()]
        made = tokenizer.canonical(self.directory, self.family, self.config)
        return {path.name: read_bytes(path) for path in copied} | made

    def decoding(self) -> dict[str, Any]:
        """The checkpoint's decoding defaults; see `export.checkpoint.generation`."""
        return decoding_defaults(self.directory, self.family)

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """Read the tensors of one part: local name -> tensor in the stored type, matrices as [in, out] views.

        They are mapped from the file, not copied unless they are stacked, and hashed. Raises CheckpointError
        for an unknown part, a file that can no longer be read or that has changed since
        an earlier read, or a NaN or Inf.
        """
        if name not in (*self.config.parts, *self.config.vision_parts):
            listed = f"{', '.join(self.config.parts[:2])} … {self.config.parts[-1]}"
            raise CheckpointError(f"{self.directory} has no part {name!r}; its parts are {listed}")
        weights = self.family.weights(self.config, name)
        stored: dict[str, torch.Tensor] = {}
        read = [tensor for weight in weights.values() for tensor in weight.tensors]
        places = {tensor: self.shards[self.names[tensor]] for tensor in read}
        for path in sorted(set(places.values())):
            with _opened(path, "pt") as file:
                stored |= {t: file.get_tensor(self.names[t]) for t, place in places.items() if place == path}
        for tensor, values in stored.items():
            found = _digest(values, self.names[tensor], name)
            if self.digests.setdefault(tensor, found) != found:
                raise CheckpointError(f"{places[tensor]} changed while it was read ({tensor}); run the build again")
        return {local: _as_read(weight, stored) for local, weight in weights.items()}


def _as_read(weight: Weight, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """A weight made of the tensors of a checkpoint: a view of one, a copy of several that are stacked."""
    if weight.stacked is None:
        start = weight.rows[0] if weight.rows else 0
        tensor = stored[weight.tensor][start : start + weight.shape[0]]
        return tensor.flatten(1).t() if weight.transposed else tensor
    stack = torch.stack([stored[tensor] for tensor in weight.tensors])
    return stack.transpose(1, 2) if weight.transposed else stack


def is_finite(values: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf; needs no temporary."""
    low, high = torch.aminmax(values)  # a NaN anywhere makes both NaN
    return math.isfinite(low) and math.isfinite(high)


def open_checkpoint(directory: str | Path, given: Mapping[str, int] = MappingProxyType({})) -> Checkpoint:
    """Open a Hugging Face directory, reading headers only; raises CheckpointError for anything unexpected.

    `given` has ids by their keys in config.json, for a directory that does not name them (`export.checkpoint.ids`).
    """
    foreign.check_path(directory)
    directory = Path(directory)
    check_access(directory, CheckpointError)
    for file in sorted(directory.iterdir()):
        if file.suffix in foreign.READ:
            check_access(file, CheckpointError)
    foreign.check_files(directory)
    foreign.check_adapter(directory)
    if not (directory / "config.json").exists():
        raise CheckpointError(foreign.no_config(directory))
    raw = json_object(directory / "config.json")
    family = find_family(raw)
    foreign.check_config(directory, raw)
    keys = family.complete(directory, ids.complete(directory, family, raw, given))
    config = ends.united(family.read_config(keys), directory, family, keys)
    index = _index(directory)
    shards: dict[str, Path] = {}
    headers: tensors.Headers = {}
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
    names = tensors.match(directory, family, config, headers)
    head = tensors.head_matrix(family, config, names)
    extra = [t for t in tensors.superfluous(family, headers, names) if not _is_copy(shards, headers, t, head)]
    if extra:
        raise CheckpointError(
            f"{directory} holds {len(extra)} tensors that the model described by config.json does not have, first "
            f"{extra[0]}; save the model without them, or use the config.json that belongs to these weights"
        )
    return Checkpoint(directory=directory, config=config, family=family, names=names, shards=shards)


def _is_copy(shards: dict[str, Path], headers: tensors.Headers, tensor: str, head: str) -> bool:
    """Whether a tensor equals the head's matrix, as savers write a head that is tied; both are mapped, not copied."""
    if headers[tensor] != headers[head]:
        return False
    values = []
    for name in (tensor, head):
        with _opened(shards[name], "pt") as file:
            values.append(file.get_tensor(name))
    return torch.equal(*values)


def _index(directory: Path) -> dict[str, str]:
    """Tensor -> file name, from the index; empty for a checkpoint of one file, which has no index."""
    single, index = (directory / SINGLE).is_file(), (directory / INDEX).is_file()
    if single and index:
        raise CheckpointError(f"{directory} holds both {SINGLE} and {INDEX}; remove the one that is out of date")
    if single:
        return {}
    if not index:
        raise CheckpointError(foreign.no_weights(directory))
    places = json_object(directory / INDEX).get("weight_map")
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
        raise CheckpointError(f"{path} is missing, though the checkpoint needs it; {again(path.parent)}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); {again(path.parent)}"
        ) from error
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be mapped ({error}); save the weights in smaller shards") from error


def _digest(values: torch.Tensor, name: str, part: str) -> str:
    """Type and SHA-256 (hex) of a tensor as stored; raises CheckpointError for NaN or Inf. Reads it once."""
    digest = hashlib.sha256()
    for chunk in torch.split(values.reshape(-1), CHUNK):
        if not is_finite(chunk):
            raise CheckpointError(f"{name} of part {part} holds NaN or Inf, expected finite numbers; {AGAIN}")
        digest.update(chunk.view(torch.uint8).numpy().data)
    return f"{values.dtype} {digest.hexdigest()}"
