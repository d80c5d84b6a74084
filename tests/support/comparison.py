"""Decoders side by side: the oracle and the back ends, compared decision by decision.

Every run is converted to the oracle's form (`oracle.Run`), so that in every comparison the same things must agree: ids,
the end, and per step the rows run, the triggering layer, the commits and the tracked tokens. The oracle records the
margin of each decision; a run with a margin below `NOISE` is ambiguous and not counted as equal. The tests and
`scripts/check.py` share this module.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import export
import runtime
from engines.options import values_of
from engines.ort.model import OnnxRuntimeModel
from engines.signatures.gpu import DRIFTS
from export.build import DEMO
from runtime.decoding.generate import Output
from runtime.decoding.policies import SCOPES, STARTS
from runtime.evaluation.exact_match import problems
from runtime.evaluation.tasks import FAMILIES
from scripts.experiments.make_random_checkpoint import SHAPES, make_checkpoint
from tests.support.oracle import Oracle, Run, Step

BACKENDS = ("onnxruntime", "eager")
NOISE = 1e-4  # float32 may decide either way if the margin of a decision is smaller
AMBIGUOUS = 0.1  # largest fraction of ambiguous runs

WINDOW, TRACK_NUM = 16, 3  # the largest of the random runs; their bundles are built for them
RUNS = 4  # of each random model, with other prompts and options
GEN_LENGTH = 192  # of the demo's prompts
STRICT = 0.99  # a gamma at which the demo's layers trigger


def recorded(out: Output) -> Run:
    """A back end's run in the oracle's form."""
    steps = [Step(e.active, e.sigma, e.trigger, e.committed, e.tracked) for e in out.trace]
    return Run(out.sequence, out.eos_at, steps)


def difference(got: Run, expected: Run) -> str | None:
    """Where two runs first diverge, in words; None if all decisions agree."""
    for number, (ours, theirs) in enumerate(zip(got.steps, expected.steps, strict=False)):
        for name in ("active", "trigger", "committed", "tracked"):
            came, wanted = getattr(ours, name), getattr(theirs, name)
            if came != wanted:
                return f"step {number}: {name} {came}, expected {wanted}"
    for name in ("nfe", "eos_at", "output_ids"):
        came, wanted = getattr(got, name), getattr(expected, name)
        if came != wanted:
            return f"{name} {came}, expected {wanted}"
    return None


def sigma_gap(got: Run, expected: Run) -> float:
    """The largest difference of a sigma between two runs with equal decisions."""
    gaps = (
        abs(a - b)
        for ours, theirs in zip(got.steps, expected.steps, strict=True)
        for a, b in zip(ours.sigma, theirs.sigma, strict=True)
    )
    return max(gaps, default=0.0)


def elastic_rows(
    run: Run, prompt_length: int, layers: int, window: int, block_caching: bool = True, refresh_scope: str = "all",
    window_span: int | None = None, refresh_start: str = "next", **_: Any,
) -> list[int]:  # fmt: skip
    """The rows that each step of `run` must compute, summed over layers.

    These are the active rows up to the trigger, and after it (or in all layers, where a refresh starts at the first)
    all rows, or all but the masks that are not active.
    """
    masked, end, present = set[int](), math.inf, prompt_length
    rows = []
    for number, step in enumerate(run.steps):
        length = step.length or len(run.output_ids)  # a recorded run has all masks from the start
        masked |= set(range(present, length))
        present = length
        open_ = [p for p in masked if p <= end]
        near = [p for p in sorted(open_)[:window] if window_span is None or p < min(open_) + window_span]
        seen = len(near) if block_caching else len(open_)
        wide = length if refresh_scope == "all" or number == 0 else length - len(masked) + seen
        ran = layers if step.trigger is None else step.trigger + 1
        again = layers if refresh_start == "first" and step.trigger is not None else layers - ran
        rows.append(step.active * ran + wide * again + (step.unrolled * layers if number else 0))
        masked -= {*step.committed}
        if run.eos_at in step.committed:
            end = run.eos_at
    return rows


# Compiled against reference: ONNX Runtime, eager PyTorch and the oracle on one prompt.


@dataclass(frozen=True)
class Comparison:
    """One prompt decoded by the oracle and the back ends `BACKENDS`.

    `margins` are the oracle's smallest margins of a decision, by kind; `diverged` maps a back end to the place where it
    left the oracle's run; `sigma` is the largest difference of a sigma among the others.
    """

    name: str
    steps: int
    refreshes: int
    margins: dict[str, float]
    diverged: dict[str, str]
    sigma: float = 0.0

    @property
    def ambiguous(self) -> bool:
        """Whether float noise may change a decision."""
        return min(self.margins.values(), default=math.inf) < NOISE

    @property
    def wrong(self) -> bool:
        """Whether a back end diverged although no decision was ambiguous."""
        return bool(self.diverged) and not self.ambiguous


def compare(
    name: str, models: Sequence[runtime.Runtime], oracle: Oracle, prompt: Sequence[int], **options: Any
) -> Comparison:
    """Decode `prompt` with the oracle and every model; all options of the elastic policy must be in `options`."""
    expected = oracle.elastic(prompt, **options)
    rows = elastic_rows(expected, len(prompt), oracle.layers, **options)
    diverged, sigma = {}, 0.0
    for model in models:
        out = model.generate(np.array(prompt), "elastic", **options)
        where = difference(recorded(out), expected)
        if where is None:
            gap = sigma_gap(recorded(out), expected)
            sigma = max(sigma, gap)
            if [event.rows for event in out.trace] != rows:
                where = f"rows run {[event.rows for event in out.trace]}, expected {rows}"
            elif gap >= NOISE:
                where = f"sigma differs by {gap:.2e}"
        if where is not None:
            diverged[model.backend] = where
    last = oracle.layers if options.get("refresh_start") == "first" else oracle.layers - 1
    refreshes = sum(step.trigger is not None and step.trigger < last for step in expected.steps)
    return Comparison(
        name=name, steps=expected.nfe, refreshes=refreshes, margins=expected.margins, diverged=diverged, sigma=sigma
    )


def loaded(stack: ExitStack, bundle: Path) -> list[runtime.Runtime]:
    """Load the bundle on each of `BACKENDS` until the stack closes, with one thread, since these models are small."""
    models = [runtime.load(bundle, backend, threads=1) for backend in BACKENDS]
    return [stack.enter_context(model) for model in (*models, layer_by_layer(bundle))]


def layer_by_layer(bundle: Path) -> runtime.Runtime:
    """Load the bundle on ONNX Runtime without the graph of all layers, as it runs large models."""
    model = runtime.load(bundle, "onnxruntime", threads=1)
    assert isinstance(model.model, OnnxRuntimeModel)
    del model.model.sessions["reuse"]
    return model


def random_shape(number: int) -> dict[str, Any]:
    """The shape of a tiny model; its kind follows from the number (five cover every kind), its sizes are drawn."""
    rng = random.Random(f"shape {number}")
    heads, vocab = rng.choice((2, 4)), rng.choice((48, 64, 96))
    return SHAPES["tiny"] | {
        "n_layers": rng.randint(1, 4), "n_heads": heads,
        "n_kv_heads": heads if number % 2 else rng.choice((1, heads // 2)),
        "d_model": heads * rng.choice((8, 12, 16)), "mlp_hidden_size": rng.choice((48, 64, 80)),
        "include_qkv_bias": number % 5 == 1, "include_bias": number % 5 in (2, 4), "weight_tying": number % 5 in (3, 4),
        "rope_theta": rng.choice((10000.0, 500000.0)), "max_sequence_length": 96, "vocab_size": vocab,
        "embedding_size": vocab, "mask_token_id": vocab - 1, "eos_token_id": vocab - 2, "pad_token_id": vocab - 2,
    }  # fmt: skip


def random_prompt(rng: random.Random, shape: dict[str, Any]) -> list[int]:
    """1 to 40 ids without the last two, which are the mask and the EOS."""
    return [rng.randrange(shape["vocab_size"] - 2) for _ in range(rng.randint(1, 40))]


def random_options(rng: random.Random) -> dict[str, Any]:
    """Options of one elastic run. At gamma 1 rounding alone can trigger a refresh; such runs are ambiguous."""
    window = rng.randint(1, WINDOW)
    by_threshold = rng.random() < 0.5
    return {
        "gen_length": rng.randint(8, 48), "window": window,
        "threshold": rng.choice((0.5, 0.7, 0.9)) if by_threshold else None,
        "tokens_per_step": None if by_threshold else rng.randint(1, min(3, window)),
        "gamma": rng.choice((0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)), "drift": rng.choice(DRIFTS),
        "track_num": rng.randint(1, TRACK_NUM), "block_caching": rng.random() < 0.7,
        "refresh_scope": rng.choice(SCOPES), "stop_at_eos": rng.random() < 0.7, "refresh_start": rng.choice(STARTS),
    }  # fmt: skip


def likely_token(rng: random.Random, oracle: Oracle, prompt: list[int]) -> int:
    """A token that the model predicts after `prompt`; as the EOS it ends the run early."""
    logits = oracle.logits([*prompt, *[oracle.config["mask_token_id"]] * 16])[len(prompt) :]
    return int(rng.choice(logits.argmax(-1).tolist()))


def random_model(number: int, folder: Path) -> tuple[Path, Path]:
    """The checkpoint of random model `number`, and its bundle, in `folder`."""
    checkpoint = make_checkpoint(folder / "checkpoint", random_shape(number), seed=number)
    return checkpoint, export.build(checkpoint, folder / "bundle", window=WINDOW, track_num=TRACK_NUM)


def random_models(count: int) -> Iterator[Comparison]:
    """Compare `RUNS` runs of each of `count` random tiny models."""
    for number in range(count):
        with TemporaryDirectory() as folder, ExitStack() as stack:
            checkpoint, bundle = random_model(number, Path(folder))
            models, oracle = loaded(stack, bundle), Oracle.read(checkpoint)
            rng = random.Random(f"runs {number}")
            for run in range(RUNS):
                prompt, options = random_prompt(rng, random_shape(number)), random_options(rng)
                options["eos_id"] = likely_token(rng, oracle, prompt)
                listed = ", ".join(f"{key}={value}" for key, value in options.items())
                name = f"model {number}, run {run}: {len(prompt)} prompt ids, {listed}"
                yield compare(name, models, oracle, prompt, **options)


def demo_prompts(count: int, checkpoint: str | Path = "demo") -> Iterator[Comparison]:
    """Compare `count` held-out problems of the demo's tasks, the families in turn, with the bundle's defaults.

    Every other pair of problems has the gamma `STRICT`: at the default few of the demo's layers trigger.
    """
    with TemporaryDirectory() as folder, ExitStack() as stack:
        models = loaded(stack, export.build(checkpoint, Path(folder) / "bundle"))
        oracle = Oracle.read(DEMO if checkpoint == "demo" else checkpoint)
        defaults = {**values_of(models[0].resolve("elastic", {})[0]), "gen_length": GEN_LENGTH}
        defaults["eos_id"] = models[0].bundle.config.end_ids
        drawn = [problems(models[0], family, -(-count // len(FAMILIES))) for family in FAMILIES]
        for number in range(count):
            problem = drawn[number % len(FAMILIES)][number // len(FAMILIES)]
            prompt = models[0].text.prompt(problem.prompt).tolist()
            options = {**defaults, "gamma": STRICT if number // len(FAMILIES) % 2 else defaults["gamma"]}
            name = f"prompt {number}, {problem.family}, gamma {options['gamma']}"
            yield compare(name, models, oracle, prompt, **options)


@dataclass(frozen=True)
class Tally:
    """The sum of a set of comparisons."""

    runs: list[Comparison]

    @property
    def ambiguous(self) -> list[Comparison]:
        """The runs with a decision that float noise may change."""
        return [run for run in self.runs if run.ambiguous]

    @property
    def diverged(self) -> list[Comparison]:
        """The other runs in which a back end left the oracle's run."""
        return [run for run in self.runs if run.wrong]

    @property
    def holds(self) -> bool:
        """Whether no run diverged and few were ambiguous: at most the fraction AMBIGUOUS of the runs, or one run."""
        return bool(self.runs) and not self.diverged and len(self.ambiguous) <= max(1, int(AMBIGUOUS * len(self.runs)))

    def counts(self) -> dict[str, int]:
        """The numbers of runs by outcome, of steps and of refreshes."""
        return {
            "compared": len(self.runs), "equal": len(self.runs) - len(self.ambiguous) - len(self.diverged),
            "ambiguous": len(self.ambiguous), "ambiguous_but_equal": sum(not run.diverged for run in self.ambiguous),
            "diverged": len(self.diverged), "steps": sum(run.steps for run in self.runs),
            "refreshes": sum(run.refreshes for run in self.runs),
        }  # fmt: skip

    def margins(self) -> dict[str, float]:
        """The smallest margin of all runs, by kind of decision."""
        kinds = sorted({kind for run in self.runs for kind in run.margins})
        return {kind: min(run.margins.get(kind, math.inf) for run in self.runs) for kind in kinds}
