"""The command line of `runtime`."""

import argparse
from pathlib import Path

from engines.cli import Parser, program, run
from engines.registry import BACKENDS
from runtime.bench.cases import POLICY_CASES
from runtime.cli import commands as do
from runtime.cli.bench import BASELINE, bench_command
from runtime.cli.options import add_policy_options, add_request_options
from runtime.cli.terminal import chat_command
from runtime.decoding.policies import POLICIES
from runtime.evaluation.tasks import FAMILIES

DEFAULT_BUNDLE = Path("bundles/demo")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `call` to its function."""
    top = Parser(prog=program("runtime"), description="Decode diffusion language models from a bundle.")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)
    add_generate(commands.add_parser("generate", help="answer a prompt"))
    add_chat(commands.add_parser("chat", help="answer one message after another; at a terminal, masks fill live"))
    add_trace(commands.add_parser("trace", help="draw what each step of a run did"))
    add_eval(commands.add_parser("eval", help="exact match on held-out problems; resumable with --json"))
    add_calibrate(commands.add_parser("calibrate", help="find the fastest setting that answers as full does; keep it"))
    add_verify(commands.add_parser("verify", help="compare the tokens of every policy with eager PyTorch"))
    add_bench(commands.add_parser("bench", help="time policies and back ends on the same problems"))
    return top


def add_generate(command: argparse.ArgumentParser) -> None:
    add_bundle(command)
    prompt = command.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the user's text; - reads it from standard input")
    prompt.add_argument("--prompt-ids", type=Path, help="a file of ids: a JSON list, or numbers separated by space")
    prompt.add_argument("--prompts", type=Path, help="a file of prompts, one per line, decoded side by side")
    command.add_argument("--image", type=Path, action="append", default=[], metavar="FILE",
                         help="an image for the prompt (repeatable; for models with a vision tower)")  # fmt: skip
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add_argument("--trace", type=Path, help="write a JSON line for each step to this file")
    add_policy_options(command)
    add_request_options(command)
    command.set_defaults(call=do.generate_command)


def add_chat(command: argparse.ArgumentParser) -> None:
    add_bundle(command)
    command.add_argument("--system", metavar="TEXT", help="a system message before the first turn")
    add_policy_options(command)
    add_request_options(command)
    command.set_defaults(call=chat_command)


def add_trace(command: argparse.ArgumentParser) -> None:
    add_bundle(command)
    command.add_argument("--prompt", required=True, help="the user's text; - reads it from standard input")
    command.add_argument("--plot", type=Path, default=Path("trace.png"), help="PNG file (default: %(default)s)")
    command.add_argument("--json", type=Path, help="write a JSON line for each step to this file")
    add_policy_options(command)
    add_request_options(command)
    command.set_defaults(call=do.trace_command, prompt_ids=None)


def add_eval(command: argparse.ArgumentParser) -> None:
    add_bundle(command)
    command.add_argument("--task", choices=FAMILIES, action="append", help="task family (repeatable; default: all)")
    command.add_argument("--limit", type=int, default=500, help="problems per family (default 500)")
    command.add_argument("--against", choices=list(POLICIES), help="compare with this policy, problem by problem")
    command.add_argument(
        "--few-shot", type=int, default=0, metavar="N", help="fill prompts with solved problems, N tokens"
    )
    command.add_argument(
        "--json", type=Path, help="file of results, one JSON line a problem; taken up again if it exists"
    )
    add_policy_options(command)
    command.add_argument("--gen-length", type=int, default=192, help="masks to fill (default 192)")
    command.set_defaults(call=do.eval_command)


def add_calibrate(command: argparse.ArgumentParser) -> None:
    add_bundle(command)
    command.add_argument("--target-agreement", type=float, default=0.99, help="fraction of equal tokens (default 0.99)")
    command.add_argument(
        "--prompts", type=Path, help="a file of prompts, one per line (default: problems of the demo's tasks)"
    )
    command.add_argument("--limit", type=int, default=40, help="prompts (default 40)")
    command.add_argument("--gen-length", type=int, default=192, help="masks to fill (default 192)")
    command.add_argument("--dry-run", action="store_true", help="leave the bundle as it is")
    command.set_defaults(call=do.calibrate_command)


def add_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", type=Path)
    command.add_argument("--backend", choices=list(BACKENDS), default="onnxruntime")
    command.add_argument("--prompts", type=int, default=4, help="random prompts per policy (default 4)")
    command.set_defaults(call=do.verify_command)


def add_bench(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", nargs="?", type=Path, default=DEFAULT_BUNDLE, help=f"default: {DEFAULT_BUNDLE}")
    command.add_argument("--backends", help="comma-separated (default: all that are installed, built and find a GPU)")
    command.add_argument("--policies", default=",".join(POLICY_CASES), help="comma-separated (default: %(default)s)")
    command.add_argument("--baseline", default=BASELINE, help="case that ratios refer to (default: %(default)s)")
    command.add_argument("--limit", type=int, default=20, help="problems, or rounds with --image (default 20)")
    command.add_argument("--prompt-length", type=int, default=500, help="tokens of the few-shot prompt (default 500)")
    command.add_argument("--gen-length", type=int, default=512, help="masks to fill (default 512)")
    command.add_argument("--threads", type=int, help="CPU threads (default: OMP_NUM_THREADS, or free cores - 1)")
    command.add_argument("--profile", action="store_true", help="also split the steps of elastic on onnxruntime")
    command.add_argument("--image", type=Path, action="append", default=[], metavar="FILE",
                         help="ask about this image instead of the problems (repeatable)")  # fmt: skip
    command.add_argument("--batches", metavar="N,…", help="also decode as many sequences side by side, as 1,2,4,8,16")
    command.add_argument("--json", type=Path, help="write the figures to this file too")
    command.add_argument("--plot", type=Path, help="write a bar chart to this PNG file")
    command.set_defaults(call=bench_command)


def add_bundle(command: argparse.ArgumentParser) -> None:
    """The bundle and the back end it is loaded on."""
    command.add_argument("bundle", nargs="?", type=Path, default=DEFAULT_BUNDLE, help=f"default: {DEFAULT_BUNDLE}")
    command.add_argument("--backend", choices=["auto", *BACKENDS], default="auto")
    command.add_argument("--threads", type=int, help="CPU threads (default: OMP_NUM_THREADS, or free cores - 1)")
    command.add_argument("--provider", choices=["auto", "cpu", "cuda", "tensorrt"],
                         help="of ONNX Runtime (default auto: CUDA where it is there and finds a GPU)")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = parser().parse_args(argv)
    return run(args.call, args, "interrupted")
