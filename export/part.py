"""Parts on disk: the weight files of a part, made from one read of its tensors, and its ONNX graphs.

A build writes the same weights to several files: the exported ones in the
bundle's precision, fp32 ones for ONNX Runtime on a CPU, and the input of the
quantiser. `write_weights` takes the tensors of a part once and casts and
transposes them chunk by chunk for all files, so memory stays that of the part
as stored and a few chunks. Files are hashed while they are written; only what
ONNX itself writes (quantised weights) is read again for its hash. Every file has
a stamp (`export.stamps`), and files that are up to date are not written.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import torch

from engines import config as configs
from engines import signatures
from engines import weights as weight_files
from engines.config import ModelConfig
from engines.errors import RangeError
from engines.files import describe
from engines.signatures import GraphSignature
from engines.signatures.gpu import gpu_signatures
from engines.signatures.vision import vision_signatures
from export import checkpoint, graphs, stamps
from export.checkpoint.reader import is_finite
from export.graphs import quantize
from export.options import WEIGHTS
from export.stamps import Files

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CHUNK = 1 << 24  # elements cast at a time


@dataclass(frozen=True)
class Target:
    """A set of parts to write: a folder of the bundle, its graphs, and their element type.

    Weights are rounded to `precision` whatever type they are stored in, so that
    all engines of a bundle hold the same numbers; `weights` (int8, int4) has the
    matrices of layers and head quantised from there.
    """

    folder: str
    dtype: str
    precision: str
    config: ModelConfig
    signatures: tuple[GraphSignature, ...]
    weights: str | None = None

    @classmethod
    def exported(cls, precision: str, config: ModelConfig, track_num: int) -> "Target":
        """The exported parts of a bundle, in its precision."""
        signatures = *gpu_signatures(config, precision, track_num), *vision_signatures(config, precision)
        return cls(folder="onnx", dtype=precision, precision=precision, config=config, signatures=signatures)

    def signature(self, part: str) -> GraphSignature:
        """The inputs and outputs of a part's graph."""
        return next(signature for signature in self.signatures if signature.name == part)

    def has(self, part: str) -> bool:
        """Whether the part is one of the set."""
        return any(signature.name == part for signature in self.signatures)

    def quantised(self, part: str) -> bool:
        """Whether the part's matrices are quantised; a table that is looked up is not, and neither is vision."""
        return self.weights is not None and part in self.config.parts[1:]

    def storage(self, part: str) -> str:
        """The element type of a part's weights; the graph of the embedding casts the rows it reads from `precision`."""
        return self.precision if part == "embed" else self.dtype

    def graph_file(self, part: str) -> str:
        """The graph's path below the bundle."""
        dialect = self.signature(part).dialect
        kind = f".{self.weights}" if self.quantised(part) else "" if dialect == "gpu" else f".{dialect}"
        return f"{self.folder}/{part}{kind}.onnx"

    def weight_file(self, part: str) -> str | None:
        """The weights' path below the bundle; None for a part without weights of its own."""
        if part not in (*self.config.parts, *self.config.vision_parts):
            return None
        return f"{self.folder}/{part}.{f'{self.weights}.data' if self.quantised(part) else 'safetensors'}"

    def weight_files(self, part: str) -> list[str]:
        """The files that hold a part's weights: of a quantised part the graph, too, which has its small tensors."""
        return [self.graph_file(part)] * self.quantised(part) + [str(self.weight_file(part))]

    def stored_file(self, part: str) -> str:
        """The file that a part's weights are stored to: the weight file, or a temporary input of the quantiser."""
        return f"{self.folder}/{part}.{'whole.' if self.quantised(part) else ''}safetensors"

    def sources(self, part: str) -> tuple[str, ...]:
        """The parts whose weight files the graph of `part` refers to: all for the graph of a whole reuse pass."""
        if part == "reuse":
            return self.config.parts
        return (part,) if self.weight_file(part) else ()


def write_weights(
    root: Path, part: str, targets: Sequence[Target], tensors: dict[str, torch.Tensor], key: str
) -> Files:
    """Write the weights of one part for all `targets` that have it; returns the entries of the files and stamps.

    `tensors` are the part's by local name, `key` identifies their content. All
    targets round to one precision and may share a file. The quantiser writes the
    graph of a quantised part together with its weights. Raises CheckpointError
    where a value does not fit the precision, OSError as the disk does.
    """
    files: Files = {}
    stale: dict[Path, tuple[Target, str]] = {}
    for target in {target.weight_file(part): target for target in targets if target.has(part)}.values():
        (root / target.folder).mkdir(parents=True, exist_ok=True)
        made_from = weights_key(target, part, key)
        reused = stamps.taken(root, target.weight_files(part), made_from)
        if reused is None:
            stale[root / target.stored_file(part)] = target, made_from
            for name in target.weight_files(part):  # written anew and not through a link to a bundle's file
                (root / name).unlink(missing_ok=True)
        else:
            files |= reused
    (precision,) = {target.precision for target in targets}
    written = store(part, tensors, {path: target.storage(part) for path, (target, _) in stale.items()}, precision)
    for path, (target, made_from) in stale.items():
        names = target.weight_files(part)
        made = quantise(root, target, part, path) if target.quantised(part) else {names[0]: written[path]}
        files |= stamps.stamp(root, names, made_from, made)
    return files


def weights_key(target: Target, part: str, key: str) -> str:
    """What the weight files of `part` are made from; `key` identifies the content of its tensors."""
    made_from = [key, target.storage(part), target.precision, str(target.config), sources_digest()]
    if target.quantised(part):
        made_from += [str(target.signature(part)), quantize.version()]
    return "|".join(made_from)


def write_graph(root: Path, target: Target, part: str) -> Files:
    """Write the graph of one part, whose weights are there; returns the entries of the file and its stamp.

    The graph depends on names and shapes of weights, not on their content. That
    of a quantised part was written with the weights. Raises OSError as the disk does.
    """
    if target.quantised(part):
        return {}
    (root / target.folder).mkdir(parents=True, exist_ok=True)
    name, signature = target.graph_file(part), target.signature(part)
    key = "|".join((str(signature), target.dtype, target.precision, str(target.config), sources_digest()))
    weights = {source: root / str(target.weight_file(source)) for source in target.sources(part)}
    return stamps.kept(root, [name], key, lambda: {name: save_graph(root / name, target, part, weights)})


def save_graph(path: Path, target: Target, part: str, weights: dict[str, Path]) -> dict[str, Any]:
    """Write and check the graph of `part`, whose `weights` lie in files beside it; returns the entry of its file."""
    files = {source: (weight_files.locate(file), file.name) for source, file in weights.items()}
    model = graphs.build(target.signature(part), target.config, target.dtype, files)
    entry = stamps.write(path, model.SerializeToString())
    graphs.weights_to_inputs(model)  # the checker refuses weight files that are links
    onnx.checker.check_model(model)
    return entry


def quantise(root: Path, target: Target, part: str, whole: Path) -> Files:
    """Quantise a part from the weight file `whole`, which is removed; returns the entries of graph and weights."""
    graph, names = whole.with_suffix(".onnx"), target.weight_files(part)
    save_graph(graph, target, part, {part: whole})
    quantize.quantize(graph, root / names[0], root / names[1], WEIGHTS[str(target.weights)])
    graph.unlink()
    whole.unlink()
    return {name: describe(root / name) for name in names}


def store(
    part: str, tensors: dict[str, torch.Tensor], dtypes: dict[Path, str], precision: str
) -> dict[Path, dict[str, Any]]:
    """Write the tensors of `part`, rounded to `precision`, to the weight files of `dtypes` (path -> element type).

    Every tensor is cast once and goes to all files chunk by chunk; returns the
    files' entries, hashed on the way.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(weight_files.writer(path, {name: (dtype, s) for name, s in shapes.items()}))
            for path, dtype in dtypes.items()
        }
        for name, tensor in tensors.items() if files else ():
            for chunk in chunks(part, name, tensor, TORCH[precision]):
                for dtype in set(dtypes.values()):
                    content = raw(chunk.to(TORCH[dtype]))
                    for path in (path for path in files if dtypes[path] == dtype):
                        files[path].write(content)
    return {path: file.entry for path, file in files.items()}


def chunks(part: str, name: str, tensor: torch.Tensor, precision: torch.dtype) -> Iterator[torch.Tensor]:
    """A tensor rounded to `precision`, some contiguous rows at a time; raises CheckpointError beyond fp16's range."""
    rows = max(1, CHUNK // max(1, tensor[0].numel()))
    for start in range(0, len(tensor), rows):
        chunk = tensor[start : start + rows]
        if (
            chunk.dim() == 2 and not chunk.is_contiguous()
        ):  # of a transposed matrix: a dense copy transposes 3 times faster
            chunk = chunk.t().contiguous().t()
        cast = chunk.to(precision).contiguous()
        if precision == torch.float16 and not is_finite(cast):
            raise RangeError(f"{part}: {name} exceeds the range of fp16")
        yield cast


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


@cache
def sources_digest() -> str:
    """SHA-256 (hex) of the code that makes parts and of ONNX's version: a change of either makes all stamps invalid."""
    folders = (Path(str(package.__file__)).parent for package in (checkpoint, graphs, signatures))
    modules = (Path(str(module.__file__)) for module in (weight_files, configs))
    paths = [Path(__file__), *modules, *(path for folder in folders for path in sorted(folder.rglob("*.py")))]
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    return hashlib.sha256(f"{onnx.__version__}{text}".encode()).hexdigest()
