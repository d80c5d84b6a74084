"""Pickled weights: recognised by their file names, never opened, because loading them can run code."""

import shlex
from pathlib import Path

PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth")


def refusal(directory: Path, target: str) -> str | None:
    """The error message for pickled weights, with the command that converts them to `target`; None without any."""
    for pattern in PATTERNS:
        if any(directory.glob(pattern)):
            code = (
                "import sys, pathlib, torch, safetensors.torch as st; d = pathlib.Path(sys.argv[1]); "
                f"w = [torch.load(f, weights_only=True, map_location='cpu') for f in sorted(d.glob('{pattern}'))]; "
                f"st.save_file({{k: v.contiguous().clone() for p in w for k, v in p.items()}}, d / '{target}')"
            )
            return (
                f"{directory} holds pickled weights ({pattern}), which can run code and are never opened; "
                f'convert them with: python -c "{code}" {shlex.quote(str(directory))}'
            )
    return None
