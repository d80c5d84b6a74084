"""Charts for those who have matplotlib: a figure to draw on, and its file."""

from pathlib import Path
from typing import Any

from engines.errors import INSTALL, OptionError


def figure(width: float, height: float) -> Any:
    """An empty figure of inches; raises OptionError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            f"drawing needs matplotlib; {INSTALL.format(extra='dev')} brings it, or draw nothing"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save(chart: Any, file: Path) -> None:
    """Write a figure in the format that the file's name asks for; raises OptionError with the remedy."""
    if file.is_dir() or not file.suffix:
        raise OptionError(f"cannot draw to {file}; choose another --plot, ending in .png")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        chart.savefig(file, dpi=130)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"cannot draw to {file} ({reason}); choose another --plot, ending in .png") from error
