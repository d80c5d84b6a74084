"""One part from a checkpoint to disk: its weight file and its ONNX graph.

Tensors are cast and transposed chunk by chunk, so memory stays that of the part
as stored. A finished part leaves a stamp with the key it was made from and the
SHA-256 of its files: a build that was interrupted, or repeated, takes the part
up again instead of making it anew. A stamp is a file of the bundle as the parts
are. Nothing here knows back ends or a manifest.
"""

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx
import torch

from engines import config as configs
from engines import weights as weight_files
from engines.bundle import STAMPS
from engines.config import ModelConfig
from engines.errors import CheckpointError
from engines.files import describe, write_atomically
from engines.signatures import GraphSignature
from engines.signatures import cpu as cpu_signatures
from engines.signatures import gpu as signatures
from export import checkpoint
from export.graphs import builder, cpu, gpu, vision, writers
from export.graphs import quantize as quantizing
from export.graphs.quantize import quantize

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CHUNK = 1 << 24  # elements cast at a time


@dataclass(frozen=True)
class Target:
    """Where and how a set of parts is written: a folder of the bundle and the graphs' element type.

    Weights are rounded to `precision` whatever type they are computed in, so
    that all engines of a bundle hold the same numbers; unless `weights` (int8,
    int4) has the matrices quantised.
    """

    root: Path
    folder: str
    dtype: str
    precision: str
    weights: str | None = None

    def storage(self, part: str) -> str:
        """The embedding stays in the bundle's precision: a graph casts only the rows it looks up."""
        return self.precision if part == "embed" else self.dtype


def write_part(
    target: Target,
    signature: GraphSignature,
    config: ModelConfig,
    key: str,
    load: Callable[[], dict[str, torch.Tensor]],
) -> dict[str, Any]:
    """Write one part unless its stamps say it is there; returns {"graph", "weights", "files"}.

    `load` reads the part's tensors (not called where it has none, or its weight
    file is there) and `key` identifies what they come from. Raises
    CheckpointError where a value does not fit the target's type, OSError as the
    disk does.
    """
    root, stem = target.root, f"{target.folder}/{signature.name}"
    (root / target.folder).mkdir(parents=True, exist_ok=True)
    graph_file = f"{stem}.onnx" if signature.dialect == "gpu" else f"{stem}.{signature.dialect}.onnx"
    weight_file = f"{stem}.safetensors" if holders(signature, config) == (signature.name,) else None
    key = "|".join(map(str, (key, target.folder, target.dtype, target.precision, sources_digest())))

    def write_weights(path: Path) -> None:
        weight_files.write(path, sources(target, signature.name, load()))

    def write_graph(path: Path, weights: dict[str, Path]) -> None:
        files = {part: (weight_files.locate(file), file.name) for part, file in weights.items()}
        onnx.save(writers.build(signature, config, target.dtype, files), str(path))
        onnx.checker.check_model(str(path))

    if target.weights is not None and signature.name in config.parts[1:]:  # the embedding is no matrix to multiply with
        graph_file, weight_file = f"{stem}.{target.weights}.onnx", f"{stem}.{target.weights}.data"

        def write_quantized() -> None:
            whole, weights = root / f"{stem}.whole.onnx", root / f"{stem}.whole.safetensors"
            write_weights(weights)
            write_graph(whole, {signature.name: weights})
            quantize(whole, root / graph_file, root / f"{stem}.{target.weights}.data", int(str(target.weights)[3:]))
            whole.unlink()
            weights.unlink()

        key += f"|{signature}|{config}|{quantizing.version()}"
        files = kept(root, [graph_file, weight_file], key, write_quantized)
        return {"graph": graph_file, "weights": weight_file, "files": files}
    files, weights = {}, {part: root / target.folder / f"{part}.safetensors" for part in holders(signature, config)}
    if weight_file:
        files = kept(root, [weight_file], f"{key}|{config}", partial(write_weights, weights[signature.name]))
    files |= kept(root, [graph_file], f"{key}|{signature}|{config}", lambda: write_graph(root / graph_file, weights))
    return {"graph": graph_file, "weights": weight_file, "files": files}


def holders(signature: GraphSignature, config: ModelConfig) -> tuple[str, ...]:
    """The parts whose weight files a graph refers to: its own, or all where it holds them all."""
    if signature.name == "reuse":
        return config.parts
    return (signature.name,) if signature.name in (*config.parts, *config.vision_parts) else ()


def kept(root: Path, names: list[str], key: str, make: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """The entries of files and of their stamp; calls `make` unless an earlier build made them from `key`."""
    stamp = f"{STAMPS}/{names[0].replace('/', '-')}.json"
    digest = hashlib.sha256(key.encode()).hexdigest()
    files = stamped(root, stamp, digest, names)
    if files is None:
        make()
        files = {name: describe(root / name) for name in names}
        write_atomically(root / stamp, json.dumps({"key": digest, "files": files}).encode())
    return files | {stamp: describe(root / stamp)}


def stamped(root: Path, stamp: str, key: str, names: list[str]) -> dict[str, dict[str, Any]] | None:
    """The entries of the files `names`, if an earlier build made them from `key` and they are still what they were."""
    try:
        content = json.loads((root / stamp).read_text())
        if not isinstance(content, dict) or content.get("key") != key:
            return None
        files = {name: describe(root / name) for name in names}
    except (OSError, ValueError):
        return None
    return files if content == {"key": key, "files": files} else None


def sources(target: Target, part: str, tensors: dict[str, torch.Tensor]) -> dict[str, weight_files.Source]:
    """Deferred chunks of each tensor in the target's type."""

    def deferred(name: str, tensor: torch.Tensor) -> weight_files.Source:
        dtype = target.storage(part)
        steps = TORCH[target.precision], TORCH[dtype]
        return weight_files.Source(dtype, tuple(tensor.shape), lambda: chunks(part, name, tensor, *steps))

    return {name: deferred(name, tensor) for name, tensor in tensors.items()}


def chunks(
    part: str, name: str, tensor: torch.Tensor, precision: torch.dtype, dtype: torch.dtype
) -> Iterator[memoryview]:
    """A tensor's bytes, rounded to `precision` and stored as `dtype`, some rows at a time."""
    rows = max(1, CHUNK // max(1, tensor[0].numel()))
    for start in range(0, len(tensor), rows):
        cast = tensor[start : start + rows].to(precision)
        if precision == torch.float16 and not bool(torch.isfinite(cast).all()):
            raise CheckpointError(f"{part}: {name} exceeds the range of fp16; build with --bf16 or --fp32")
        yield cast.to(dtype).contiguous().view(torch.uint8).numpy().data


@cache
def sources_digest() -> str:
    """Changes with the code that makes parts, so that no stamp outlives it."""
    modules = builder, gpu, cpu, vision, writers, quantizing, weight_files, signatures, cpu_signatures, configs
    readers = sorted(Path(str(checkpoint.__file__)).parent.rglob("*.py"))  # a family's names say which tensor is which
    text = "".join([*map(inspect.getsource, (*modules, sys.modules[__name__])), *(p.read_text() for p in readers)])
    return hashlib.sha256(f"{onnx.__version__}{text}".encode()).hexdigest()
