"""The command line of `runtime`."""

import argparse
from pathlib import Path

from engines.cli import Parser, program, run
from engines.registry import BACKENDS
from engines.signatures.gpu import DRIFTS
from runtime.bench.cases import POLICY_CASES
from runtime.cli import commands as do
from runtime.cli.bench import BASELINE, bench_command
from runtime.cli.terminal import chat_command
from runtime.decoding.policies import POLICIES, SCOPES
from runtime.decoding.policies.blocks import ALGORITHMS, REMASKING
from runtime.evaluation.tasks import FAMILIES

DEFAULT_BUNDLE = Path("bundles/demo")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog=program("runtime"), description="Decode diffusion language models from a bundle.")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)
    make = commands.add_parser("generate", help="answer a prompt")
    add_bundle(make)
    prompt = make.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the user's text; - reads it from standard input")
    prompt.add_argument("--prompt-ids", type=Path, help="a file of ids: a JSON list, or numbers separated by space")
    make.add_argument("--image", type=Path, action="append", default=[], metavar="FILE",
                      help="an image for the prompt (repeatable; for models that see)")  # fmt: skip
    prompt.add_argument("--prompts", type=Path, help="a file of prompts, one a line, decoded side by side")
    add_decoding(make)
    add_request(make)
    make.add_argument("--stop", help="end the text before this string")
    make.add_argument("--json", action="store_true", help="print the result as JSON")
    make.add_argument("--trace", type=Path, help="write a JSON line for each step to this file")
    make.set_defaults(call=do.generate_command)
    talk = commands.add_parser("chat", help="answer one message after another; at a terminal, masks fill as you watch")
    add_bundle(talk)
    talk.add_argument("--system", metavar="TEXT", help="a message of the system before the first turn")
    add_decoding(talk)
    add_request(talk)
    talk.set_defaults(call=chat_command)
    look = commands.add_parser("trace", help="draw what each step of a run did")
    add_bundle(look)
    look.add_argument("--prompt", required=True, help="the user's text; - reads it from standard input")
    add_decoding(look)
    look.add_argument("--gen-length", type=int, help="masks to fill (default 256)")
    look.add_argument("--plot", type=Path, default=Path("trace.png"), help="PNG file (default: %(default)s)")
    look.add_argument("--json", type=Path, help="write a JSON line for each step to this file")
    look.set_defaults(call=do.trace_command, prompt_ids=None)
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
    test.set_defaults(call=do.eval_command)
    tune = commands.add_parser("calibrate", help="find the cheapest setting that answers as full does, and keep it")
    add_bundle(tune)
    tune.add_argument("--target-agreement", type=float, default=0.99, help="share of equal tokens (default 0.99)")
    tune.add_argument(
        "--prompts", type=Path, help="a file of prompts, one a line (default: problems of the demo's tasks)"
    )
    tune.add_argument("--limit", type=int, default=40, help="prompts (default 40)")
    tune.add_argument("--gen-length", type=int, default=192, help="masks to fill (default 192)")
    tune.add_argument("--dry-run", action="store_true", help="leave the bundle as it is")
    tune.set_defaults(call=do.calibrate_command)
    check = commands.add_parser("verify", help="end-to-end tokens against eager PyTorch")
    check.add_argument("bundle", type=Path)
    check.add_argument("--backend", choices=list(BACKENDS), default="onnxruntime")
    check.add_argument("--prompts", type=int, default=4, help="random prompts per policy (default 4)")
    check.set_defaults(call=do.verify_command)
    speed = commands.add_parser("bench", help="time policies and back ends on the same problems")
    speed.add_argument("bundle", nargs="?", type=Path, default=DEFAULT_BUNDLE, help=f"default: {DEFAULT_BUNDLE}")
    speed.add_argument(
        "--backends", help="comma-separated (default: all that are installed, built and find their device)"
    )
    speed.add_argument("--policies", default=",".join(POLICY_CASES), help="comma-separated (default: %(default)s)")
    speed.add_argument("--baseline", default=BASELINE, help="what ratios refer to (default: %(default)s)")
    speed.add_argument("--limit", type=int, default=20, help="problems, or rounds with --image (default 20)")
    speed.add_argument("--prompt-length", type=int, default=500, help="tokens of the few-shot prompt (default 500)")
    speed.add_argument("--gen-length", type=int, default=512, help="masks to fill (default 512)")
    speed.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    speed.add_argument("--profile", action="store_true", help="also split the steps of elastic on onnxruntime")
    speed.add_argument("--image", type=Path, action="append", default=[], metavar="FILE",
                       help="ask about this image, not the problems (repeatable; for models that see)")  # fmt: skip
    speed.add_argument("--batches", metavar="N,…", help="also decode as many sequences side by side, as 1,2,4,8,16")
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
    command.add_argument("--max-masks", type=int, help="masks of the answer that are there at once (elastic)")
    command.add_argument(
        "--window-span", type=int, help="positions from its first mask that the window spans (elastic)"
    )
    command.add_argument("--steps", type=int, help="steps of the fixed schedule (all but elastic)")
    command.add_argument("--block-length", type=int, help="length of a block (full, prefix, dual, interval)")
    command.add_argument("--remasking", choices=REMASKING, help="what a fixed schedule ranks masks by (full, …)")
    command.add_argument("--cfg-scale", type=float, help="classifier-free guidance (full, timesteps)")
    command.add_argument("--alg", choices=ALGORITHMS, help="what masks are ranked by (timesteps)")
    command.add_argument("--alg-temp", type=float, help="temperature of drawing by rank (timesteps)")
    command.add_argument("--eps", type=float, help="time of the last step (timesteps)")
    command.add_argument("--prompt-interval", type=int, help="steps between full refreshes (interval)")
    command.add_argument("--response-interval", type=int, help="steps between refreshes of the answer (interval)")


def add_request(command: argparse.ArgumentParser) -> None:
    """Options of what is asked for, whatever the policy."""
    command.add_argument("--gen-length", type=int, help="masks to fill (default 256)")
    command.add_argument("--temperature", type=float, help="Gumbel noise on the logits (default 0: arg-max)")
    command.add_argument("--top-p", type=float, help="draw from the most probable tokens of this probability together")
    command.add_argument("--top-k", type=int, help="draw from this many most probable tokens")
    command.add_argument("--seed", type=int, help="of what is drawn by chance")
    command.add_argument("--logits-eos-inf", action="store_true", default=None, help="never say EOS")
    command.add_argument("--confidence-eos-eot-inf", action="store_true", default=None,
                         help="say EOS and the end of a turn last")  # fmt: skip
    command.add_argument("--no-stop-at-eos", action="store_false", dest="stop_at_eos", default=None)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run(args.call, args, "interrupted")
