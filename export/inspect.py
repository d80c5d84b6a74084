"""What a bundle holds, as text: its model and capacity, its engines by back end, its parts."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engines.bundle import Bundle
from engines.defaults import calibrations, evidence

# Layers of a TensorRT network that show which operators stayed whole.
NATIVE = ("ROTARY_EMBEDDING", "KV_CACHE_UPDATE", "ATTENTION_INPUT", "MATRIX_MULTIPLY", "GATHER", "TOPK", "SOFTMAX")


def show(bundle: Bundle, console: Console) -> None:
    """Print a bundle's model, capacity, defaults with their evidence, engines and parts."""
    manifest = bundle.manifest
    console.print(f"{bundle.root}: {manifest.checkpoint['name']} ({manifest.checkpoint['identity'][:16]}), "
                  f"{manifest.precision}, built with {manifest.tools}")  # fmt: skip
    console.print(f"model {manifest.model}")
    console.print(f"capacity {manifest.capacity}")
    console.print(f"defaults of decoding {manifest.defaults or 'as the policies have them'}")
    if measured := chosen(bundle):
        figures = ", ".join(f"{name} {value}" for name, value in measured.items())
        console.print(f"measured by calibrate: {figures} ({calibrations(manifest.files)[0]} has all trials)")
    for name, entry in manifest.engines.items():
        show_engines(name, entry, manifest.files, console)
    table = Table("part", "inputs", "outputs", "MB")
    for name, part in manifest.parts.items():
        size = sum(manifest.files[part[kind]]["size"] for kind in ("graph", "weights") if part[kind]) / 1e6
        table.add_row(name, tensors(part["inputs"]), tensors(part["outputs"]), f"{size:.2f}")
    console.print(table)


def chosen(bundle: Bundle) -> dict[str, Any]:
    """What a calibration measured, and for which setting; empty where the calibration was undone."""
    return {name: value for name, value in evidence(bundle).items() if not isinstance(value, list) and name != "before"}


def tensors(entries: list[dict[str, Any]]) -> str:
    """Name, element type and axes of each tensor, a line each."""
    return "\n".join(f"{tensor['name']} {tensor['dtype']} {tensor['axes']}" for tensor in entries)


def show_engines(name: str, entry: dict[str, Any], files: dict[str, Any], console: Console) -> None:
    """Print the engines of a back end: compiler and targets, then each plan's profiles, native layers and size."""
    if "plans" not in next(iter(entry["parts"].values())):
        weights = f", weights in {entry['weights']}" if entry.get("weights") else ""
        console.print(f"engines {name}: {entry['precision']}{weights}, profiles {entry['profiles']}")
        return
    targets = ", ".join([*entry["capabilities"], *entry.get("compatible", ())])
    console.print(f"engines {name}: {entry['precision']}, {entry['flavour']} {entry['version']}, "
                  f"compute capability {targets}, slots {entry['slots']}")  # fmt: skip
    table = Table("part", "plans", "layers that stayed native", "profiles")
    for part, made in entry["parts"].items():
        plans = "\n".join(f"{Path(file).name} {files[file]['size'] / 1e6:.2f} MB" for file in made["plans"].values())
        native = "\n".join(f"{count} {kind}" for kind, count in made["layers"].items() if kind in NATIVE)
        table.add_row(part, plans, native, "\n".join(map(str, entry["profiles"][part])))
    console.print(table)
