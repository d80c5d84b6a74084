"""The command line of `runtime`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from engines.cli import Parser, program, run
from engines.errors import OptionError
from engines.options import from_shell
from engines.registry import BACKENDS
from runtime.bench.cases import POLICY_CASES
from runtime.cli import commands as do
from runtime.cli import measures
from runtime.cli.bench import BASELINE, bench_command
from runtime.cli.fill import fill_command
from runtime.cli.options import add_policy_options, add_request_options
from runtime.cli.terminal import chat_command
from runtime.decoding.policies import POLICIES
from runtime.evaluation.puzzles import FAMILIES as PUZZLES
from runtime.evaluation.tasks import FAMILIES

DEFAULT_BUNDLE = Path("bundles/demo")
RESUMES = "interrupted; run the same command again to go on where it stopped"


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `call` to its function."""
    top = Parser(prog=program("runtime"), description="Decode diffusion language models from a bundle.")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name: str, help: str, add: Callable[[argparse.ArgumentParser], None], example: str) -> None:
        add(commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", example=example))

    command("generate", "answer a prompt", add_generate, 'bundles/demo --prompt "Tom has 12 pens. How many pens?"')
    command("chat", "answer one message after another; at a terminal, masks fill live", add_chat,
            'bundles/demo --system "Answer briefly."')  # fmt: skip
    command("trace", "draw what each step of a run did", add_trace,
            'bundles/demo --prompt "Tom has 12 pens. How many pens?" --plot trace.png')  # fmt: skip
    command("eval", "exact match on held-out problems; resumable with --out", add_eval,
            "bundles/demo --limit 100 --against full --out eval.jsonl")  # fmt: skip
    command("calibrate", "find the fastest setting that answers as full does; keep it", add_calibrate,
            "bundles/demo --target-agreement 0.95 --dry-run")  # fmt: skip
    command("verify", "compare the tokens of every policy with eager PyTorch", add_verify, "bundles/demo --prompts 2")
    command("bench", "time policies and back ends on the same problems", add_bench,
            "bundles/demo --policies full,elastic --limit 5 --out bench.json")  # fmt: skip
    return top


def add_generate(command: argparse.ArgumentParser) -> None:
    add_bundle(command)
    group = command.add_argument_group("the prompt", "one of --prompt, --prompt-ids, --prompts and --canvas")
    prompt = group.add_mutually_exclusive_group()
    add_prompt(prompt)
    prompt.add_argument("--prompt-ids", type=Path, metavar="FILE", help="a file of ids: a JSON list, or spaced numbers")
    prompt.add_argument("--prompts", type=Path, metavar="FILE",
                        help="a file of prompts, decoded side by side: one a line, text or a JSON object")  # fmt: skip
    add_system(group)
    group.add_argument("--image", type=Path, action="append", default=[], metavar="FILE",
                       help="an image for the prompt (repeatable; for models with a vision tower)")  # fmt: skip
    group.add_argument("--canvas", type=Path, metavar="FILE",
                       help="text with holes such as {{name:24}} to fill; with --prompt it is the answer")  # fmt: skip
    group.add_argument("--suffix", metavar="TEXT", help="fill the gap between --prompt and this text")
    group.add_argument("--prefix-cache", type=int, metavar="BYTES",
                       help="compute what chat messages share before the last one once, and keep it")  # fmt: skip
    output = command.add_argument_group("output")
    form = output.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the result as JSON")
    form.add_argument("--stream", action="store_true", help="print the text as it settles, from its beginning")
    output.add_argument("--trace", type=Path, metavar="FILE", help="write a JSON line for each step to this file")
    output.add_argument("--out", type=Path, metavar="FILE", help="also write each answer of --prompts to this file")
    output.add_argument("--resume", action="store_true", help="answer the prompts that --out has no answer to yet")
    add_policy_options(command)
    add_request_options(command)
    command.set_defaults(call=generate_or_fill)


def generate_or_fill(args: argparse.Namespace) -> None:
    """Fill a canvas or the gap before a suffix, else answer; raises OptionError without a prompt."""
    if args.canvas is not None or args.suffix is not None:
        return fill_command(args)
    if args.prompt is None and args.prompt_ids is None and args.prompts is None:
        raise OptionError("there is nothing to do; give one of --prompt, --prompt-ids, --prompts and --canvas")
    return do.generate_command(args)


def add_chat(command: argparse.ArgumentParser) -> None:
    add_bundle(command)
    add_system(command.add_argument_group("the conversation"))
    add_policy_options(command)
    add_request_options(command)
    command.set_defaults(call=chat_command)


def add_trace(command: argparse.ArgumentParser) -> None:
    add_bundle(command)
    group = command.add_argument_group("the prompt")
    add_prompt(group).required = True
    add_system(group)
    output = add_output(command, "write a JSON line for each step to this file")
    add_plot(output, Path("trace.png"), "the drawing, a file ending in .png, .svg or .pdf")
    add_policy_options(command)
    add_request_options(command)
    command.set_defaults(call=measures.trace_command, prompt_ids=None)


def add_eval(command: argparse.ArgumentParser) -> None:
    add_bundle(command)
    group = command.add_argument_group("the problems")
    group.add_argument("--task", choices=(*FAMILIES, *PUZZLES), action="append",
                       help=f"task family (repeatable; default: {' and '.join(FAMILIES)})")  # fmt: skip
    group.add_argument("--limit", type=int, default=500, metavar="N", help="problems per family")
    group.add_argument(
        "--few-shot", type=int, default=0, metavar="N", help="fill prompts with solved problems, N tokens"
    )
    group.add_argument("--gen-length", type=int, default=192, metavar="N", help="masks to fill")
    group.add_argument("--against", choices=list(POLICIES), help="compare with this policy, problem by problem")
    add_output(command, "keep the results in this file, a JSON line each; what is in it is not run again")
    add_policy_options(command)
    command.set_defaults(call=measures.eval_command)


def add_calibrate(command: argparse.ArgumentParser) -> None:
    add_bundle(command)
    group = command.add_argument_group("the search")
    group.add_argument("--target-agreement", type=float, default=0.95, metavar="X",
                       help="fraction of answers equal to those of full")  # fmt: skip
    group.add_argument("--prompts", type=Path, metavar="FILE",
                       help="a file of prompts, one per line (default: problems of the demo's tasks)")  # fmt: skip
    group.add_argument("--limit", type=int, default=40, metavar="N", help="prompts, half of them to confirm")
    group.add_argument("--gen-length", type=int, default=192, metavar="N", help="masks to fill")
    group.add_argument("--dry-run", action="store_true", help="leave the bundle as it is")
    group.add_argument("--undo", action="store_true", help="take back the last calibration, and do nothing else")
    add_json(command.add_argument_group("output"))
    command.set_defaults(call=measures.calibrate_command)


def add_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", type=Path, help="a bundle's folder")
    command.add_argument("--backend", choices=list(BACKENDS), default="onnxruntime", help="back end to compare")
    command.add_argument("--prompts", type=int, default=4, metavar="N", help="random prompts per policy")
    add_json(command.add_argument_group("output"))
    command.set_defaults(call=measures.verify_command)


def add_bench(command: argparse.ArgumentParser) -> None:
    add_bundle(command, several=True)
    group = command.add_argument_group("what is measured")
    group.add_argument("--policies", default=",".join(POLICY_CASES), metavar="NAME,…", help="cases")
    group.add_argument("--baseline", default=BASELINE, metavar="NAME", help="case that ratios refer to")
    group.add_argument("--limit", type=int, default=20, metavar="N", help="problems, or rounds with --image")
    group.add_argument("--prompt-length", type=int, default=500, metavar="N", help="tokens of the few-shot prompt")
    group.add_argument("--gen-length", type=int, default=512, metavar="N", help="masks to fill")
    group.add_argument("--profile", action="store_true", help="also split the steps of elastic on onnxruntime")
    group.add_argument("--image", type=Path, action="append", default=[], metavar="FILE",
                       help="ask about this image instead of the problems (repeatable)")  # fmt: skip
    group.add_argument("--batches", metavar="N,…", help="also decode as many sequences side by side, as 1,2,4,8,16")
    output = add_output(command, "write the figures to this file too")
    add_plot(output, None, "write a bar chart to this file, ending in .png, .svg or .pdf")
    command.set_defaults(call=bench_command)


def add_bundle(command: argparse.ArgumentParser, several: bool = False) -> None:
    """The bundle and the back end it is loaded on, or several of them."""
    command.add_argument("bundle", nargs="?", type=Path, default=DEFAULT_BUNDLE,
                         help=f"a bundle's folder (default: {DEFAULT_BUNDLE})")  # fmt: skip
    group = command.add_argument_group("where it runs")
    group.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, or free cores - 1)"
    )
    if several:
        group.add_argument("--backends", metavar="NAME,…",
                           help="back ends (default: all that are installed, built and find a GPU)")  # fmt: skip
        return
    group.add_argument("--backend", choices=["auto", *BACKENDS], default="auto", help="back end")
    group.add_argument("--provider", choices=["auto", "cpu", "cuda"],
                       help="of ONNX Runtime (default: auto, CUDA where it is there and finds a GPU)")  # fmt: skip


def add_prompt(group: argparse._ActionsContainer) -> argparse.Action:
    return group.add_argument("--prompt", metavar="TEXT", help="the user's text; - reads it from standard input")


def add_system(group: argparse._ActionsContainer) -> None:
    group.add_argument("--system", metavar="TEXT", type=from_shell, help="a system message before the first turn")


def add_json(group: argparse._ActionsContainer) -> None:
    group.add_argument("--json", action="store_true", help="print JSON in place of text and tables")


def add_plot(group: argparse._ActionsContainer, default: Path | None, help: str) -> None:
    group.add_argument("--plot", type=Path, metavar="FILE", default=default, help=help)


def add_output(command: argparse.ArgumentParser, kept: str) -> argparse._ActionsContainer:
    """--json, and --out with what it keeps."""
    group = command.add_argument_group("output")
    add_json(group)
    group.add_argument("--out", type=Path, metavar="FILE", help=kept)
    return group


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = parser().parse_args(argv)
    resumes = args.command == "eval" and args.out is not None
    return run(args.call, args, RESUMES if resumes else "interrupted")
