"""Answer three held-out problems with Elastic-Cache and with plain eager decoding, side by side."""

import random
import sys

from rich.console import Console
from rich.table import Table

import runtime
from engines.errors import ElasticError
from runtime.cli import DEFAULT_BUNDLE
from runtime.evaluation.tasks import generate, grade

GEN_LENGTH = 192


def main() -> None:
    """Decode each problem twice, and print the answers and a table of both."""
    rng = random.Random("demo")
    problems = [generate(family, rng, "test", steps) for family, steps in (("sums", 7), ("programs", 5), ("sums", 12))]
    elastic = runtime.load(DEFAULT_BUNDLE, "onnxruntime")
    eager = runtime.load(DEFAULT_BUNDLE, "eager")
    table = Table("problem", "decoding", "answer", "steps", "seconds", "tokens/s", "layer-rows")
    console = Console(highlight=False, markup=False, width=110)
    for number, problem in enumerate(problems, 1):
        runs = (
            ("elastic, onnxruntime", elastic.generate(problem.prompt, "elastic", gen_length=GEN_LENGTH)),
            ("full, eager", eager.generate(problem.prompt, "full", gen_length=GEN_LENGTH)),
        )
        console.rule(f"problem {number} ({problem.family})")
        console.print(problem.prompt)
        console.rule("elastic", style="dim")
        console.print(runs[0][1].text)
        for name, out in runs:
            verdict = "correct" if grade(out.text, problem) else f"wrong, expected {problem.answer}"
            speed = f"{out.tokens / out.seconds:.0f}"
            table.add_row(
                str(number), name, verdict, str(out.steps), f"{out.seconds:.2f}", speed, f"{out.computed_fraction:.1%}"
            )
    console.print(table)
    console.print(f"elastic: {elastic.model.device}; eager: {eager.model.device}; both stop at EOS")


if __name__ == "__main__":
    try:
        main()
    except ElasticError as error:
        sys.exit(f"error: {error}")
