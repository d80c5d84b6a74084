"""The command line of `runtime`."""

import argparse
import json
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.progress import Progress
from rich.table import Table

from engines.backends import BACKENDS, available
from engines.console import Parser, run, screen
from engines.errors import BundleError, DeviceError, OptionError, PromptError
from engines.spec import DRIFTS
from runtime import calibrate, profile
from runtime.api import Runtime, load
from runtime.bench import POLICY_CASES, bench, cases, figure_class, plot, prompts, report, write
from runtime.controller import StepEvent
from runtime.evaluate import compare, evaluate, key_of, summary
from runtime.policies import POLICIES, SCOPES, Elastic
from runtime.tasks import FAMILIES
from runtime.trace import plot as draw_trace
from runtime.verify import verify

DEFAULT_BUNDLE = Path("bundles/demo")
console = screen()
DECODING = (
    "window", "threshold", "tokens_per_step", "gamma", "drift", "track_num", "block_caching", "refresh_scope",
    "horizon", "steps", "block_length", "prompt_interval", "response_interval",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="python -m runtime", description="Decode diffusion language models from a bundle.")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)
    make = commands.add_parser("generate", help="answer a prompt")
    add_bundle(make)
    prompt = make.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the user's text; - reads it from standard input")
    prompt.add_argument("--prompt-ids", type=Path, help="a file of ids: a JSON list, or numbers separated by space")
    add_decoding(make)
    make.add_argument("--gen-length", type=int, help="masks to fill (default 256)")
    make.add_argument("--temperature", type=float, help="Gumbel noise on the logits (default 0: arg-max)")
    make.add_argument("--seed", type=int, help="of the noise")
    make.add_argument("--stop", help="end the text before this string")
    make.add_argument("--no-stop-at-eos", action="store_false", dest="stop_at_eos", default=None)
    make.add_argument("--json", action="store_true", help="print the result as JSON")
    make.add_argument("--trace", type=Path, help="write a JSON line for each step to this file")
    make.set_defaults(call=generate_command)
    look = commands.add_parser("trace", help="draw what each step of a run did")
    add_bundle(look)
    look.add_argument("--prompt", required=True, help="the user's text; - reads it from standard input")
    add_decoding(look)
    look.add_argument("--gen-length", type=int, help="masks to fill (default 256)")
    look.add_argument("--plot", type=Path, default=Path("trace.png"), help="PNG file (default: %(default)s)")
    look.add_argument("--json", type=Path, help="write a JSON line for each step to this file")
    look.set_defaults(call=trace_command, prompt_ids=None)
    test = commands.add_parser("eval", help="exact match on held-out problems; resumable with --json")
    add_bundle(test)
    add_decoding(test)
    test.add_argument("--task", choices=FAMILIES, action="append", help="task family (repeatable; default: all)")
    test.add_argument("--limit", type=int, default=500, help="problems per family (default 500)")
    test.add_argument("--against", choices=list(POLICIES), help="compare with this policy, problem by problem")
    test.add_argument(
        "--few-shot", type=int, default=0, metavar="N", help="fill prompts with solved problems, N tokens"
    )
    test.add_argument("--gen-length", type=int, default=192, help="masks to fill (default 192)")
    test.add_argument("--json", type=Path, help="file of results, one JSON line a problem; taken up again if it exists")
    test.set_defaults(call=eval_command)
    tune = commands.add_parser("calibrate", help="find the cheapest setting that answers as full does, and keep it")
    add_bundle(tune)
    tune.add_argument("--target-agreement", type=float, default=0.99, help="share of equal tokens (default 0.99)")
    tune.add_argument(
        "--prompts", type=Path, help="a file of prompts, one a line (default: problems of the demo's tasks)"
    )
    tune.add_argument("--limit", type=int, default=40, help="prompts (default 40)")
    tune.add_argument("--gen-length", type=int, default=192, help="masks to fill (default 192)")
    tune.add_argument("--dry-run", action="store_true", help="leave the bundle as it is")
    tune.set_defaults(call=calibrate_command)
    check = commands.add_parser("verify", help="end-to-end tokens against eager PyTorch")
    check.add_argument("bundle", type=Path)
    check.add_argument("--backend", choices=list(BACKENDS), default="onnxruntime")
    check.add_argument("--prompts", type=int, default=4, help="random prompts per policy (default 4)")
    check.set_defaults(call=verify_command)
    speed = commands.add_parser("bench", help="time policies and back ends on the same problems")
    speed.add_argument("bundle", nargs="?", type=Path, default=DEFAULT_BUNDLE, help=f"default: {DEFAULT_BUNDLE}")
    speed.add_argument(
        "--backends", help="comma-separated (default: all that are installed, built and find their device)"
    )
    speed.add_argument("--policies", default=",".join(POLICY_CASES), help="comma-separated (default: %(default)s)")
    speed.add_argument("--baseline", default="eager full-greedy", help="what ratios refer to (default: %(default)s)")
    speed.add_argument("--limit", type=int, default=20, help="problems (default 20)")
    speed.add_argument("--prompt-length", type=int, default=500, help="tokens of the few-shot prompt (default 500)")
    speed.add_argument("--gen-length", type=int, default=512, help="masks to fill (default 512)")
    speed.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    speed.add_argument("--profile", action="store_true", help="also split the steps of elastic on onnxruntime")
    speed.add_argument("--json", type=Path, help="write the figures to this file too")
    speed.add_argument("--plot", type=Path, help="write a bar chart to this PNG file")
    speed.set_defaults(call=bench_command)
    return top


def add_bundle(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", nargs="?", type=Path, default=DEFAULT_BUNDLE, help=f"default: {DEFAULT_BUNDLE}")
    command.add_argument("--backend", choices=["auto", *BACKENDS], default="auto")
    command.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    command.add_argument("--provider", choices=["auto", "cpu", "cuda", "tensorrt"],
                         help="of ONNX Runtime (default auto: CUDA where it is there and finds a GPU)")  # fmt: skip


def add_decoding(command: argparse.ArgumentParser) -> None:
    """Options of the policies; one that the chosen policy does not use is refused."""
    command.add_argument("--policy", choices=list(POLICIES))
    command.add_argument("--window", type=int, help="masks predicted per step (elastic)")
    command.add_argument("--threshold", type=float, help="confidence from which a token is committed")
    command.add_argument("--tokens-per-step", type=int, help="commit this many instead (elastic)")
    command.add_argument("--gamma", type=float, help="drift similarity below which a layer triggers (elastic)")
    command.add_argument("--drift", choices=DRIFTS, help="variant of the drift test (elastic)")
    command.add_argument("--track-num", type=int, help="tracked tokens per layer (elastic)")
    command.add_argument("--no-block-caching", action="store_false", dest="block_caching", default=None)
    command.add_argument("--refresh-scope", choices=SCOPES, help="what a refresh computes (elastic)")
    command.add_argument("--horizon", type=int, help="masks of the answer that are there at once (elastic)")
    command.add_argument("--steps", type=int, help="steps of the fixed schedule (full, prefix, dual, interval)")
    command.add_argument("--block-length", type=int, help="length of a block (full, prefix, dual, interval)")
    command.add_argument("--prompt-interval", type=int, help="steps between full refreshes (interval)")
    command.add_argument("--response-interval", type=int, help="steps between refreshes of the answer (interval)")


def decoding(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in DECODING}


def opened(args: argparse.Namespace) -> Runtime:
    model = load(args.bundle, args.backend, threads=args.threads, provider=args.provider)
    if model.model.note:
        print(f"note: {model.model.note}", file=sys.stderr)
    return model


def read_prompt(args: argparse.Namespace) -> Any:
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
    """A file of events, one JSON line a step; opened with the first, so that a refused request loses no older file."""

    def __init__(self, path: Path | None):
        self.path = path
        self.file: TextIO | None = None

    def __enter__(self) -> "Trace":
        return self

    def write(self, event: StepEvent) -> None:
        if self.path is None:
            return
        try:
            self.file = self.file or self.path.open("w")
            print(json.dumps(event.to_json()), file=self.file, flush=True)
        except OSError as error:
            raise OptionError(
                f"cannot write the trace to {self.path} ({error.strerror}); choose another file"
            ) from error

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            with suppress(OSError):  # every line was flushed when it was written
                self.file.close()


def generate_command(args: argparse.Namespace) -> None:
    prompt = read_prompt(args)
    request = {name: getattr(args, name) for name in ("gen_length", "temperature", "seed", "stop", "stop_at_eos")}
    with opened(args) as model, Trace(args.trace) as trace:
        for event in model.stream(prompt, args.policy, **decoding(args), **request):
            if isinstance(event, StepEvent):
                trace.write(event)
        assert not isinstance(event, StepEvent)
        if args.json:
            print(json.dumps(event.to_json() | {"backend": model.backend, "device": model.model.device}))
            return
        print(event.text)
        console.print(
            f"[{model.backend}] {event.tokens} tokens in {event.steps} steps, {event.seconds:.3f} s, "
            f"{event.tokens / event.seconds:.1f} tokens/s, {event.share:.1%} of layer-rows computed"
        )


def trace_command(args: argparse.Namespace) -> None:
    figure, prompt = figure_class(), read_prompt(args)
    if args.policy not in (None, "elastic"):
        raise OptionError(f"trace draws the policy elastic, which tests for drift; {args.policy} does not")
    with opened(args) as model, Trace(args.json) as trace:
        out = model.generate(prompt, "elastic", **decoding(args), gen_length=args.gen_length)
        for event in out.trace:
            trace.write(event)
        chosen, _ = model.resolve("elastic", decoding(args))
        assert isinstance(chosen, Elastic)
        try:
            draw_trace(out.trace, model.bundle.config.layers, chosen.gamma, args.plot, figure)
        except OSError as error:
            raise OptionError(f"cannot write {args.plot} ({error.strerror}); choose another --plot") from error
    print(out.text)
    refreshed = sum(event.trigger is not None for event in out.trace)
    console.print(f"{out.steps} steps, {refreshed} with a refresh; drawn to {args.plot}")


def eval_command(args: argparse.Namespace) -> None:
    options = decoding(args) | {"gen_length": args.gen_length}
    other = {"gen_length": args.gen_length}
    table = Table("", "exact match (95 %)", "steps", "tokens/s", "layer-rows")
    lines, both = [], ([], [])  # type: list[dict[str, Any]], tuple[list[Any], list[Any]]
    with opened(args) as model:
        for family in args.task or FAMILIES:
            ways = [(args.policy, options)] + ([(args.against, other)] if args.against else [])
            for (policy, given), kept in zip(ways, both, strict=False):
                results = evaluate(model, family, args.limit, policy, given, args.json, console, args.few_shot)
                kept += results
                lines.append(key_of(model, family, policy, given, args.few_shot) | summary(results))
                low, high = lines[-1]["interval"]
                table.add_row(
                    f"{family} {policy or 'default'}", f"{lines[-1]['exact_match']:.1%} ({low:.1%} … {high:.1%})",
                    f"{lines[-1]['steps']:.1f}", f"{lines[-1]['tokens_per_second']:.0f}", f"{lines[-1]['share']:.1%}",
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
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise PromptError(f"cannot read prompts from {path} ({error}); write one a line, as UTF-8") from error


def verify_command(args: argparse.Namespace) -> None:
    for line in verify(args.bundle, args.backend, args.prompts):
        console.print(line)
    console.print("[ok] all tokens agree")


def bench_command(args: argparse.Namespace) -> None:
    names = args.backends.split(",") if args.backends else available()
    with ExitStack() as stack:
        models = []
        for name in names:
            try:
                models.append(stack.enter_context(load(args.bundle, name, threads=args.threads)))
            except (DeviceError, BundleError) as error:
                if args.backends:
                    raise
                print(f"note: {name} is left out: {error}", file=sys.stderr)
        measured = cases(models, args.policies.split(","))
        with Progress(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("bench", total=args.limit)
            for number in bench(measured, args.limit, args.prompt_length, args.gen_length):
                bar.update(task, completed=number)
        figures = report(measured, args.baseline, args.prompt_length, args.gen_length)
        if args.profile:
            figures["profile"] = profile_of(models, args)
    if args.plot:
        plot(figures, args.plot)
    if args.json:
        write(figures, args.json)
    table = Table(
        "", "s p50", "s p95", "tokens/s", "steps", "layer-rows", "right", f"times faster than {figures['baseline']}"
    )
    for row in figures["cases"]:
        seconds, (low, high) = row["seconds"], row["times_faster_quartiles"]
        table.add_row(
            row["case"], f"{seconds['p50']:.3f}", f"{seconds['p95']:.3f}", f"{row['tokens_per_second']:.1f}",
            f"{row['steps']:.1f}", f"{row['layer_rows_computed']:.1%}", f"{row['exact_match']:.0%}",
            f"{row['times_faster']:.2f} ({low:.2f} … {high:.2f})",
        )  # fmt: skip
    console.print(table)
    if args.profile:
        kinds = (f"{kind}, ms ({slices['steps']} steps)" for kind, slices in figures["profile"].items())
        split = Table("elastic on onnxruntime", *kinds)
        for line in profile.rows(figures["profile"]):
            split.add_row(*line)
        console.print(split)
    print(json.dumps(figures))


def profile_of(models: list[Runtime], args: argparse.Namespace) -> Any:
    model = next((model for model in models if model.backend == "onnxruntime"), None)
    if model is None:
        raise OptionError("--profile is of onnxruntime: add it to --backends, or leave --profile out")
    drawn = (prompt for prompt, _ in prompts(model, args.limit, args.prompt_length))
    return profile.profile(model, drawn, args.gen_length, "elastic", {})


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run(args.call, args, "interrupted")
