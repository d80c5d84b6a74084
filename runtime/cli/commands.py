"""The commands of `runtime`: each takes the parsed arguments."""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from engines.cli import screen
from engines.errors import OptionError, PromptError
from engines.files import writing
from runtime.answer import Answer, pieces
from runtime.api import Runtime, load
from runtime.cli.options import given_options, policy_of
from runtime.cli.prompts import Asked, Results, answers, read_prompt, read_prompts
from runtime.cli.prompts import read_lines as read_lines
from runtime.decoding.events import StepEvent
from runtime.decoding.generate import Output, stream
from runtime.outputs import ANY, TRACE, check_output

console = screen()


def opened(args: argparse.Namespace) -> Runtime:
    """Load the bundle on the back end that the arguments name."""
    kept = getattr(args, "prefix_cache", None)  # an option of `generate`
    return load(args.bundle, args.backend, kept, threads=args.threads, provider=args.provider)


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
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.file or self.path.open("w", encoding="utf-8")
            print(json.dumps(event.to_json()), file=self.file, flush=True)

    def through(self, events: Iterable[StepEvent | Output]) -> Iterator[StepEvent | Output]:
        """The same events, each step written as it passes."""
        for event in events:
            if isinstance(event, StepEvent):
                self.write(event)
            yield event

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            with suppress(OSError):  # every line was flushed when it was written
                self.file.close()


def with_system(prompt: Any, system: str | None) -> Any:
    """The text or the messages behind a system message, if there is one; raises OptionError for ids."""
    if system is None:
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not (isinstance(turns, list) and turns and isinstance(turns[0], dict)):
        raise OptionError("--system is a message before a text; give --prompt, or leave --system out")
    return [{"role": "system", "content": system}, *turns]


def behind(one: Asked, system: str | None) -> Asked:
    """A prompt of a file behind a system message; one that cannot be has an error."""
    try:
        return one if one.error else replace(one, prompt=with_system(one.prompt, system))
    except OptionError as error:
        return replace(one, error=str(error))


def generate_command(args: argparse.Namespace) -> None:
    """Answer a prompt, or a file of prompts."""
    check_output(args.trace, TRACE, "choose another file for the trace")
    if args.prompts is not None:
        return generate_all(args)
    if args.out is not None or args.resume:
        raise OptionError("--out and --resume are for a file of prompts; give --prompts, or leave them out")
    prompt, options = with_system(read_prompt(args.prompt, args.prompt_ids), args.system), given_options(args)
    if "image_layout" in options and not args.image:
        raise OptionError("--image-layout has no effect without an image; give --image, or leave it out")
    with opened(args) as model, Trace(args.trace) as trace:
        policy, given = model.resolve(policy_of(args), options)
        request = model.request(prompt, args.image, given)
        events: Iterator[Any] = trace.through(stream(model.model, request, policy, model.decode))
        if args.stream:
            events = pieces(events, Answer(model, np.size(request.prompt_ids), request))
        for event in events:
            if isinstance(event, str):
                print(event, end="", flush=True)
        assert isinstance(event, Output)
        if args.json:
            print(json.dumps(event.to_json() | {"backend": model.backend, "device": model.model.device}))
            return
        print("" if args.stream else event.text)
        console.print(
            f"[{model.backend}] {event.tokens} tokens in {event.steps} steps, {event.seconds:.3f} s, "
            f"{event.tokens / event.seconds:.1f} tokens/s, {event.computed_fraction:.1%} of layer-rows computed"
            + (f", {event.image_seconds:.3f} s for the images" if args.image else "")
        )


def generate_all(args: argparse.Namespace) -> None:
    """Answer the prompts of a file, as many side by side as the bundle was built for.

    A prompt that cannot be answered has its error in a line, and an error at the end says how many there were.
    """
    if args.image:
        raise OptionError("--image belongs to one prompt; give --prompt, or leave --image out")
    if args.stream:
        raise OptionError("--stream shows one answer as it comes; give --prompt, or leave --stream out")
    if args.trace is not None:
        raise OptionError("--trace writes the steps of one prompt; give --prompt, or leave --trace out")
    check_output(args.out, ANY, "choose another --out")
    prompts = [behind(one, args.system) for one in read_prompts(args.prompts)]
    policy, options = policy_of(args), given_options(args)
    with closing(Results(args.out, args.resume)) as results, opened(args) as model:
        model.check_options(policy, options)  # what concerns all prompts is refused before the first
        keys = {one.number: one.key(model.bundle.identity, policy, options) for one in prompts}
        results.expect({*keys.values()})
        left = [one for one in prompts if keys[one.number] not in results.done]
        tokens, refused, began = 0, [], time.perf_counter()  # type: int, list[str], float
        for one, out in answers(model, left, policy, options):
            record = {"prompt": one.number} | ({} if one.id is None else {"id": one.id})
            if isinstance(out, Output):
                record |= out.to_json() | {"backend": model.backend}
                tokens += out.tokens
            else:
                record |= {"line": one.line, "error": out}
                refused.append(str(one.number))
            results.write(record | {"key": keys[one.number]})
            if args.json:
                print(json.dumps(record), flush=True)
            elif isinstance(out, Output):
                print(f"[{one.number}] {out.text}", flush=True)
            else:
                print(f"error: prompt {one.number} (line {one.line}): {out}", file=sys.stderr)
        seconds = time.perf_counter() - began
        if not args.json:
            console.print(
                f"[{model.backend}] {len(left) - len(refused)} prompts, {tokens} tokens in {seconds:.3f} s, "
                f"{tokens / seconds:.1f} tokens/s"
                + (f"; {len(prompts) - len(left)} were answered before" if len(left) < len(prompts) else "")
            )
    if refused:
        raise PromptError(
            f"{len(refused)} of {len(prompts)} prompts were not answered: {', '.join(refused)}; correct them"
        )
