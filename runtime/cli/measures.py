"""The commands that measure: `eval`, `calibrate`, `trace` and `verify`.

Standard output has text and tables, or JSON with --json; progress is on standard error.
What can be refused is refused before a bundle is loaded, or before the first prompt is decoded.
"""

import argparse
import json
from dataclasses import asdict
from typing import Any

from rich.table import Table

from engines.bundle import Bundle
from engines.cli import progress, screen
from engines.errors import OptionError
from runtime.bench.plots import check_plot, plot_trace
from runtime.cli.commands import Trace, opened, with_system
from runtime.cli.options import given_options, policy_of
from runtime.cli.prompts import read_lines, read_prompt
from runtime.decoding.policies import fitting
from runtime.decoding.policies.elastic import Elastic
from runtime.evaluation import calibrate, exact_match
from runtime.evaluation.exact_match import compare, evaluate, key_of, summary
from runtime.evaluation.parity import verify
from runtime.evaluation.tasks import FAMILIES
from runtime.outputs import TRACE, check_distinct, check_output

console = screen()


def trace_command(args: argparse.Namespace) -> None:
    """Decode one prompt with a policy that tests for drift, and draw its steps."""
    check_output(args.out, TRACE, "choose another --out")
    check_plot(args.plot)
    check_distinct(args.out, args.plot)
    prompt, options = with_system(read_prompt(args.prompt, None), args.system), given_options(args)
    with opened(args) as model, Trace(args.out) as trace:
        chosen, _ = model.resolve(policy_of(args) or Elastic.name, options)
        if not isinstance(chosen, Elastic):
            raise OptionError(f"trace draws the policy elastic, which tests for drift; {chosen.name} does not")
        out = model.generate(prompt, chosen.name, **options)
        for event in out.trace:
            trace.write(event)
        layers = model.bundle.config.layers
        plot_trace(out.trace, layers, chosen.gamma, args.plot)
    refreshed = sum(event.refreshed for event in out.trace)
    if args.json:
        print(json.dumps(out.to_json() | {"refreshes": refreshed, "plot": str(args.plot)}))
        return
    print(out.text)
    console.print(f"{out.steps} steps, {refreshed} with a refresh; drawn to {args.plot}")


def eval_command(args: argparse.Namespace) -> None:
    """Measure exact match on held-out problems, and compare with another policy problem by problem."""
    exact_match.check(args.limit, args.few_shot, args.out)
    ways = [(policy_of(args), given_options(args))]
    if args.against:
        ways.append((args.against, {"gen_length": args.gen_length}))
    table = Table("", "exact match (95 %)", "steps", "tokens/s", "layer-rows")
    lines: list[dict[str, Any]] = []
    both: tuple[list[Any], list[Any]] = [], []
    with opened(args) as model:
        for name, given in ways:
            model.check_options(name, given)
        for family in args.task or FAMILIES:
            for (name, given), kept in zip(ways, both, strict=False):
                with progress(f"{family} {name or 'default'}", args.limit) as done:
                    results = evaluate(model, family, args.limit, name, given, args.out, args.few_shot, done)
                kept += results
                line = summary(results)
                lines.append(key_of(model, family, name, given, args.few_shot) | line)
                low, high = line["interval"]
                table.add_row(
                    f"{family} {name or 'default'}", f"{line['exact_match']:.1%} ({low:.1%} … {high:.1%})",
                    f"{line['steps']:.1f}", f"{line['tokens_per_second']:.0f}", f"{line['computed_fraction']:.1%}",
                )  # fmt: skip
    if args.against:
        lines.append({"paired": args.against, **compare(*both)})
    if args.json:
        for line in lines:
            print(json.dumps(line))
        return
    console.print(table)
    if args.against:
        found = lines[-1]
        console.print(
            f"against {args.against}: {found['difference']:+.2%} ({found['low']:+.2%} … {found['high']:+.2%}), "
            f"gained {found['gained']}, lost {found['lost']} of {found['problems']} (McNemar p = {found['p']:.3f}); "
            f"{found['agreement']:.2%} of tokens equal, {found['times_faster']:.1f} times faster"
        )


def calibrate_command(args: argparse.Namespace) -> None:
    """Search for the fastest setting that answers as `full` does, and make it the bundle's default; or undo that."""
    if args.undo:
        again = calibrate.undo(args.bundle)
        text = f"[ok] {again or 'those of the policies'} are the defaults of {args.bundle} again"
        console.print(json.dumps({"defaults": again}) if args.json else text)
        return
    asked: list[Any] = read_lines(args.prompts)[: args.limit] if args.prompts else calibrate.prompts(args.limit)
    calibrate.check(args.target_agreement, asked)
    with opened(args) as model:
        trials = []
        for trial in calibrate.calibrate(model, args.target_agreement, asked, args.gen_length):
            trials.append(trial)
            text = (
                f"{trial.half}: {trial.agreement:.1%} of answers, {trial.tokens:.2%} of tokens, "
                f"{1e3 * trial.seconds:.0f} ms an answer: {trial.options}"
            )
            console.print(json.dumps(asdict(trial)) if args.json else text)
        stays = trials[-1].options == calibrate.defaults(model)
        if not args.dry_run:
            calibrate.keep(model, args.target_agreement, trials, args.gen_length, len(asked))
    if not args.json:
        what = "stays" if stays else "would be" if args.dry_run else "is now"
        console.print(f"[ok] {trials[-1].options} {what} the default of {args.bundle}")


def verify_command(args: argparse.Namespace) -> None:
    """Compare the tokens of every policy with eager PyTorch."""
    policies = fitting(Bundle.open(args.bundle).config)
    with progress("verify", args.prompts * len(policies)) as done:
        for runs in verify(args.bundle, args.backend, args.prompts, done=done):
            console.print(json.dumps(asdict(runs)) if args.json else str(runs))
    if not args.json:
        judged = f"[ok] {runs.weights} runs; its parts are compared by `export verify`"
        console.print(judged if runs.weights else "[ok] all tokens agree")
