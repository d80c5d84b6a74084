"""Answer three held-out problems with Elastic-Cache and with plain decoding, side by side, one thread each."""

import random
import sys

from rich.console import Console
from rich.table import Table

import runtime
from engines.errors import ElasticError
from runtime.api import Runtime
from runtime.cli import DEFAULT_BUNDLE
from runtime.evaluation.tasks import generate, grade

GEN_LENGTH = 192
PROBLEMS = (("sums", 7), ("programs", 5), ("sums", 12))  # family and worked steps
WAYS = (("elastic", "onnxruntime"), ("full", "onnxruntime"), ("full", "eager"))
CAPTION = (
    "full: all rows of all layers in each step, one token a step. elastic: Elastic-Cache with the bundle's defaults, "
    "on the same engines. eager: the same model in plain PyTorch, not compiled, the baseline of every comparison. "
    "One thread each; all stop at EOS."
)


def main() -> None:
    """Decode each problem in three ways; print the answers of elastic, and a table of all."""
    rng = random.Random("demo")
    problems = [generate(family, rng, "test", steps) for family, steps in PROBLEMS]
    models: dict[str, Runtime] = {name: runtime.load(DEFAULT_BUNDLE, name, threads=1) for _, name in WAYS}
    table = Table("problem", "policy", "back end", "answer", "steps", "seconds", "tokens/s", "layer-rows")
    console = Console(highlight=False, markup=False, width=110)
    for number, problem in enumerate(problems, 1):
        console.rule(f"problem {number} ({problem.family})")
        console.print(problem.prompt)
        for policy, backend in WAYS:
            out = models[backend].generate(problem.prompt, policy, gen_length=GEN_LENGTH)
            if policy == "elastic":
                console.rule("elastic", style="dim")
                console.print(out.text)
            verdict = "correct" if grade(out.text, problem) else f"wrong, expected {problem.answer}"
            speed = f"{out.tokens / out.seconds:.0f}"
            table.add_row(
                str(number), policy, backend, verdict, str(out.steps), f"{out.seconds:.2f}", speed,
                f"{out.computed_fraction:.1%}",
            )  # fmt: skip
        table.add_section()
    console.print(table)
    console.print(CAPTION)
    for name, model in models.items():
        console.print(f"{name}: {model.model.device}")


if __name__ == "__main__":
    try:
        main()
    except ElasticError as error:
        sys.exit(f"error: {error}")
