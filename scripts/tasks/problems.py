"""The demo's held-out problems as tasks of lm-evaluation-harness: the same problems and grades, without a download."""

import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from runtime.evaluation import tasks
from runtime.evaluation.exact_match import SEED

COUNT = 500


def drawn(family: str) -> dict[str, list[dict[str, str]]]:
    """The first problems that `runtime eval` draws; with the demo's tokenizer each has at most 128 tokens."""
    rng = random.Random(f"{SEED}/{family}")
    problems = [tasks.generate(family, rng, "test", rng.randint(*tasks.STEPS[family])) for _ in range(COUNT)]
    return {"test": [{"prompt": p.prompt, "solution": p.solution, "answer": p.answer} for p in problems]}


def sums(**_: Any) -> Any:
    """The data set of `sums`."""
    from datasets import Dataset

    return {split: Dataset.from_list(rows) for split, rows in drawn("sums").items()}


def programs(**_: Any) -> Any:
    """The data set of `programs`."""
    from datasets import Dataset

    return {split: Dataset.from_list(rows) for split, rows in drawn("programs").items()}


def process_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """1 if the number after the last #### is the answer, as `runtime eval` grades."""
    found = tasks.Problem("", doc["prompt"], doc["solution"], doc["answer"])
    return {"exact_match": float(tasks.grade(results[0], found))}
