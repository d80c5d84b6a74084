"""How often the demo model writes a missing line of a worked solution as it was, from what stands before and behind it.

    python scripts/experiments/infilling.py --work DIR [--limit 200] [--out FILE]

A line of a held-out problem's solution, not the last, is a hole of as many tokens and four more, which an end may
leave. Each is filled by `full` and by `elastic` with the bundle's defaults, with and without the lines behind it.
"""

import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import export
import runtime
from runtime.canvas import escaped
from runtime.evaluation import intervals, tasks
from scripts.experiments import report

SEED, SPARE = 20261127, 4
STEPS = 5, 9


def cases(model: runtime.Runtime, family: str, count: int) -> list[tuple[str, str, str, str]]:
    """Prompt, the lines before, the missing line and those behind, of `count` held-out problems."""
    rng, found = random.Random(f"{SEED}/{family}"), []
    for _ in range(count):
        problem = tasks.generate(family, rng, "test", rng.randint(*STEPS))
        lines = problem.solution.splitlines(keepends=True)
        at = rng.randrange(len(lines) - 1)
        found.append((problem.prompt, "".join(lines[:at]), lines[at].rstrip("\n"), "\n" + "".join(lines[at + 1 :])))
    return found


def study(model: runtime.Runtime, family: str, count: int) -> dict[str, Any]:
    """Exact match of the missing line, by policy and with or without what stands behind it."""
    found: dict[str, Any] = {}
    for policy in ("full", "elastic"):
        for behind in (True, False):
            right = steps = 0
            for prompt, before, line, rest in cases(model, family, count):
                hole = f"{{{{line:{len(model.text.literal(line)) + SPARE}}}}}"
                filled = model.fill(f"{escaped(before)}{hole}{escaped(rest) if behind else ''}", prompt, policy)
                right += filled.holes["line"].split("\n")[0].rstrip() == line.rstrip()
                steps += filled.output.steps
            low, high = intervals.wilson(right, count)
            found[f"{policy}, {'with' if behind else 'without'} the lines behind"] = {
                "exact_match": right / count, "interval": [low, high], "steps": steps / count
            }  # fmt: skip
            print(family, list(found.items())[-1], flush=True)
    return found


def main() -> None:
    args = report.parser(__doc__, 200).parse_args()
    bundle = export.build("demo", args.work / "demo", backends=["onnxruntime"])
    with runtime.load(bundle, "onnxruntime", threads=1) as model:
        figures = {"families": {family: study(model, family, args.limit) for family in tasks.FAMILIES}}
        report.finish(figures | report.about(__file__, [model], limit=args.limit), args)


if __name__ == "__main__":
    main()
