"""`generate --canvas` and `generate --suffix`: holes are filled where they are."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines.cli import screen
from engines.errors import OptionError, PromptError
from runtime.canvas import Filled, escaped
from runtime.cli.commands import Trace, opened, with_system
from runtime.cli.options import given_options, policy_of
from runtime.cli.prompts import read_bytes, read_prompt
from runtime.decoding.events import StepEvent
from runtime.decoding.request import OPTIONS
from runtime.outputs import TRACE, check_output

GAP = "gap"  # the name of the hole before a suffix
UNUSED = {
    "prompts": "--prompts", "prompt_ids": "--prompt-ids", "stream": "--stream", "image": "--image", "out": "--out",
    "resume": "--resume",
}  # fmt: skip
console = screen()


def fill_command(args: argparse.Namespace) -> None:
    """Fill a canvas, or the gap between a prompt and a suffix."""
    check_output(args.trace, TRACE, "choose another file for the trace")
    option = "--canvas" if args.canvas else "--suffix"
    if args.canvas and args.suffix is not None:
        raise OptionError("--canvas has its own text behind its holes; give --suffix without it, or leave --suffix out")
    for name, flag in UNUSED.items():
        if getattr(args, name):
            raise OptionError(f"{flag} has no meaning with {option}; leave one of them out")
    options = given_options(args)
    prompt = read_prompt(args.prompt, None)
    if args.canvas:
        canvas, prompt = read_canvas(args.canvas), with_system(prompt, args.system) if prompt else None
    else:
        if prompt is None or args.system:
            raise OptionError("--suffix is the text behind a gap, and --prompt the text before it; give --prompt alone")
        size = options.pop("gen_length", OPTIONS["gen_length"].default)
        canvas, prompt = f"{escaped(prompt)}{{{{{GAP}:{size}}}}}{escaped(args.suffix)}", None
    with opened(args) as model, Trace(args.trace) as trace:
        events = model.fill_stream(canvas, prompt, policy_of(args), **options)
        *_, filled = traced(events, trace)
        assert isinstance(filled, Filled)
        show(filled, args, model.backend, model.model.device)


def traced(events: Iterator[Any], trace: Trace) -> Iterator[Any]:
    """The same events, each step written to the trace."""
    for event in events:
        if isinstance(event, StepEvent):
            trace.write(event)
        yield event


def show(filled: Filled, args: argparse.Namespace, backend: str, device: str) -> None:
    """Print the text, or all as JSON."""
    if args.json:
        print(json.dumps(filled.to_json() | {"backend": backend, "device": device}))
        return
    print(filled.text)
    for name in filled.failed:
        console.print(f"the hole {name!r} is not of its type: {filled.holes[name]!r}", markup=False)
    out = filled.output
    console.print(
        f"[{backend}] {len(filled.holes)} holes in {out.steps} steps, {out.seconds:.3f} s, "
        f"{out.computed_fraction:.1%} of layer-rows computed", markup=False,
    )  # fmt: skip


def read_canvas(source: Path) -> str:
    """The text of a file, or of standard input for `-`; its last newline is not part of it. Raises PromptError."""
    try:
        text = read_bytes(source).decode()
    except UnicodeError as error:
        raise PromptError(f"{source} is not text ({error}); save the canvas as UTF-8") from error
    return text.removesuffix("\n").removesuffix("\r")
