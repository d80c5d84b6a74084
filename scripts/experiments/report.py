"""What all experiments share: their options, the facts that figures hold for, and where figures go."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engines.errors import OptionError
from runtime.api import Runtime
from runtime.bench.cases import machine, write

ROOT = Path(__file__).resolve().parents[2]


def parser(doc: str | None, limit: int | None = None) -> argparse.ArgumentParser:
    """The options --work, --out and --plot, and --limit if it has a default."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--work", type=Path, required=True, help="folder for checkpoints and bundles")
    made.add_argument("--out", type=Path, help="write the figures to this file too")
    made.add_argument("--plot", type=Path, help="draw the figures to this PNG file")
    if limit is not None:
        made.add_argument("--limit", type=int, default=limit, help="number of problems (default: %(default)s)")
    return made


def about(file: str, models: Sequence[Runtime], **facts: Any) -> dict[str, Any]:
    """What the figures of the experiment in `file` hold for: machine, versions, its command and more facts."""
    return machine(models) | {"command": command(file, **facts)} | facts


def command(file: str, **options: Any) -> str:
    """The experiment's command line without --work and the files it writes."""
    listed = "".join(f" --{name.replace('_', '-')} {value}" for name, value in options.items())
    return f"python {Path(file).resolve().relative_to(ROOT)}{listed}"


def resumed(file: Path | None, empty: dict[str, Any]) -> dict[str, Any]:
    """The figures that an earlier run left in `file`, or `empty`."""
    if file is None or not file.exists():
        return empty
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found["command"]
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{file} holds something else than figures; choose another --out") from error
    return found


def finish(figures: dict[str, Any], args: argparse.Namespace, draw: Callable[[Path], None] | None = None) -> None:
    """Write --out, draw --plot, and print the figures as one JSON line."""
    if args.out:
        write(figures, args.out)
    if draw is not None and args.plot:
        draw(args.plot)
    print(json.dumps(figures))
