"""The commands of `runtime`: each takes the parsed arguments."""

import argparse
import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from engines.cli import screen
from engines.errors import OptionError, PromptError
from engines.files import writing
from runtime.api import Runtime, load
from runtime.bench.plots import plot_trace
from runtime.cli.options import given_options, policy_of
from runtime.decoding.controller import StepEvent
from runtime.decoding.policies.elastic import Elastic
from runtime.evaluation import calibrate
from runtime.evaluation.exact_match import compare, evaluate, key_of, summary
from runtime.evaluation.parity import verify
from runtime.evaluation.tasks import FAMILIES

console = screen()


def opened(args: argparse.Namespace) -> Runtime:
    """Load the bundle on the back end that the arguments name."""
    return load(args.bundle, args.backend, threads=args.threads, provider=args.provider)


def read_prompt(args: argparse.Namespace) -> Any:
    """The prompt's text or ids, from the arguments, standard input or a file; raises PromptError."""
    if args.prompt_ids is None:
        try:
            return sys.stdin.read() if args.prompt == "-" else args.prompt
        except UnicodeError as error:
            raise PromptError(f"standard input is not text ({error}); save the prompt as UTF-8") from error
    try:
        text = args.prompt_ids.read_text()
        return json.loads(text) if text.lstrip().startswith("[") else [int(word) for word in text.split()]
    except (OSError, ValueError, RecursionError) as error:
        raise PromptError(f"cannot read ids from {args.prompt_ids} ({error}); write them as [1, 2, 3]") from error


class Trace:
    """A file of step events, one JSON line each; opened at the first, so that a refused request keeps an older file."""

    def __init__(self, path: Path | None):
        self.path = path
        self.file: TextIO | None = None

    def __enter__(self) -> "Trace":
        return self

    def write(self, event: StepEvent) -> None:
        """Append an event; raises OptionError if the file cannot be written."""
        if self.path is None:
            return
        with writing(self.path, "choose another file for the trace"):
            self.file = self.file or self.path.open("w")
            print(json.dumps(event.to_json()), file=self.file, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            with suppress(OSError):  # every line was flushed when it was written
                self.file.close()


def generate_command(args: argparse.Namespace) -> None:
    """Answer a prompt, or a file of prompts."""
    if args.prompts is not None:
        return generate_all(args, read_lines(args.prompts))
    prompt = read_prompt(args)
    with opened(args) as model, Trace(args.trace) as trace:
        for event in model.stream(prompt, policy_of(args), args.image, **given_options(args)):
            if isinstance(event, StepEvent):
                trace.write(event)
        assert not isinstance(event, StepEvent)
        if args.json:
            print(json.dumps(event.to_json() | {"backend": model.backend, "device": model.model.device}))
            return
        print(event.text)
        console.print(
            f"[{model.backend}] {event.tokens} tokens in {event.steps} steps, {event.seconds:.3f} s, "
            f"{event.tokens / event.seconds:.1f} tokens/s, {event.computed_fraction:.1%} of layer-rows computed"
            + (f", {event.image_seconds:.3f} s for the images" if args.image else "")
        )


def generate_all(args: argparse.Namespace, prompts: list[str]) -> None:
    """Answer the prompts of a file, as many side by side as the bundle was built for."""
    if args.image:
        raise OptionError("--image belongs to one prompt; give --prompt, or leave --image out")
    if args.trace is not None:
        raise OptionError("--trace writes the steps of one prompt; give --prompt, or leave --trace out")
    if not prompts:
        raise PromptError(f"{args.prompts} holds no prompt; write one per line")
    with opened(args) as model:
        size, tokens, began = model.bundle.capacity.max_batch, 0, time.perf_counter()
        for start in range(0, len(prompts), size):
            outs = model.generate_batch(prompts[start : start + size], policy_of(args), **given_options(args))
            tokens += sum(out.tokens for out in outs)
            for number, out in enumerate(outs, start + 1):
                if args.json:
                    print(json.dumps({"prompt": number} | out.to_json() | {"backend": model.backend}))
                else:
                    print(f"[{number}] {out.text}")
        seconds = time.perf_counter() - began
        if not args.json:
            console.print(
                f"[{model.backend}] {len(prompts)} prompts, {tokens} tokens in {seconds:.3f} s, "
                f"{tokens / seconds:.1f} tokens/s"
            )


def trace_command(args: argparse.Namespace) -> None:
    """Decode one prompt with a policy that tests for drift, and draw its steps."""
    prompt = read_prompt(args)
    with opened(args) as model, Trace(args.json) as trace:
        options = given_options(args)
        chosen, _ = model.resolve(policy_of(args) or Elastic.name, options)
        if not isinstance(chosen, Elastic):
            raise OptionError(f"trace draws the policy elastic, which tests for drift; {chosen.name} does not")
        out = model.generate(prompt, chosen.name, **options)
        for event in out.trace:
            trace.write(event)
        layers = model.bundle.config.layers
        plot_trace(out.trace, layers, chosen.gamma, args.plot)
    print(out.text)
    refreshed = sum(event.refreshed(layers) for event in out.trace)
    console.print(f"{out.steps} steps, {refreshed} with a refresh; drawn to {args.plot}")


def eval_command(args: argparse.Namespace) -> None:
    """Measure exact match on held-out problems, and compare with another policy problem by problem."""
    options, policy = given_options(args), policy_of(args)
    other = {"gen_length": args.gen_length}
    table = Table("", "exact match (95 %)", "steps", "tokens/s", "layer-rows")
    lines, both = [], ([], [])  # type: list[dict[str, Any]], tuple[list[Any], list[Any]]
    with opened(args) as model:
        for family in args.task or FAMILIES:
            ways = [(policy, options)] + ([(args.against, other)] if args.against else [])
            for (name, given), kept in zip(ways, both, strict=False):
                results = evaluate(model, family, args.limit, name, given, args.json, console, args.few_shot)
                kept += results
                lines.append(key_of(model, family, name, given, args.few_shot) | summary(results))
                low, high = lines[-1]["interval"]
                table.add_row(
                    f"{family} {name or 'default'}", f"{lines[-1]['exact_match']:.1%} ({low:.1%} … {high:.1%})",
                    f"{lines[-1]['steps']:.1f}", f"{lines[-1]['tokens_per_second']:.0f}",
                    f"{lines[-1]['computed_fraction']:.1%}",
                )  # fmt: skip
    console.print(table)
    if args.against:
        found = compare(*both)
        console.print(
            f"against {args.against}: {found['difference']:+.2%} ({found['low']:+.2%} … {found['high']:+.2%}), "
            f"gained {found['gained']}, lost {found['lost']} of {found['problems']} (McNemar p = {found['p']:.3f}); "
            f"{found['agreement']:.2%} of tokens equal, {found['times_faster']:.1f} times faster"
        )
        lines.append({"paired": args.against, **found})
    for line in lines:
        print(json.dumps(line))


def calibrate_command(args: argparse.Namespace) -> None:
    """Search for the fastest setting that agrees with `full`, and make it the bundle's default."""
    with opened(args) as model:
        asked: list[Any] = calibrate.prompts(args.limit)
        if args.prompts:
            asked = read_lines(args.prompts)[: args.limit]
        trials = []
        for trial in calibrate.calibrate(model, args.target_agreement, asked, args.gen_length):
            trials.append(trial)
            console.print(f"{trial.agreement:.2%} of tokens, {1e3 * trial.seconds:.0f} ms an answer: {trial.options}")
        if not args.dry_run:
            calibrate.keep(model, args.target_agreement, trials, args.gen_length, len(asked))
    what = "would be the default of" if args.dry_run else "is now the default of"
    console.print(f"[ok] {trials[-1].options} {what} {args.bundle}")


def read_lines(path: Path) -> list[str]:
    """The lines of a file, or of standard input for -, that are not blank; raises PromptError."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        return [line for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise PromptError(f"cannot read prompts from {path} ({error.strerror}); check the path") from error
    except UnicodeError as error:
        raise PromptError(f"{path} holds no text ({error}); write one prompt per line, as UTF-8") from error


def verify_command(args: argparse.Namespace) -> None:
    """Compare the tokens of every policy with eager PyTorch."""
    for line in verify(args.bundle, args.backend, args.prompts):
        console.print(line)
