"""What a GPU check found: figures by name, written to a file after each, and errors in place of figures."""

import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPEATS = 10


class Report:
    """The figures of one part of the check; a measurement that fails leaves its error, and the next one runs."""

    def __init__(self, file: Path, head: dict[str, Any]):
        self.file, self.content, self.failed = file, dict(head), list[str]()

    def note(self, name: str, measure: Callable[[], Any]) -> Any:
        """Add what `measure` returns, and its seconds; returns it, or None where it failed."""
        began, found = time.perf_counter(), None
        try:
            self.content[name] = found = measure()
        except Exception as error:  # whatever a machine with a GPU may show: the other figures are worth as much
            self.failed.append(name)
            self.content[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            traceback.print_exc()
        self.content.setdefault("seconds", {})[name] = round(time.perf_counter() - began, 2)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({name: self.content[name]}), f"{self.content['seconds'][name]} s", flush=True)
        return found


def timed(work: Callable[[], Any], sync: Callable[[], None], repeats: int = REPEATS) -> float:
    """Median seconds of `work` and the wait for it."""
    seconds = []
    for _ in range(repeats + 3):
        sync()
        began = time.perf_counter()
        work()
        sync()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


def queued(work: Callable[[], Any], sync: Callable[[], None], repeats: int = REPEATS) -> float:
    """Seconds of `work` when many follow each other without a wait."""
    work()
    sync()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    sync()
    return (time.perf_counter() - began) / repeats
