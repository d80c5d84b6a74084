"""Checkpoints that a test changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from export.checkpoint.reader import INDEX, SINGLE


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def as_single(directory: Path) -> Path:
    (directory / INDEX).unlink()
    next(directory.glob("*.safetensors")).rename(directory / SINGLE)
    return directory


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint of one file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / SINGLE).items()}
    change(tensors)
    save_file(tensors, directory / SINGLE)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    files = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
    return {name: tensor for file in files for name, tensor in load_file(directory / file).items()}
