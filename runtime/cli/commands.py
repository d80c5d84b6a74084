"""The commands of `runtime`: each takes the parsed arguments."""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from engines.cli import screen
from engines.errors import OptionError, PromptError
from engines.files import writing
from runtime.answer import Answer, pieces
from runtime.api import Runtime, load
from runtime.cli.options import given_options, policy_of
from runtime.decoding.controller import StepEvent
from runtime.decoding.generate import Output, stream
from runtime.outputs import TRACE, check_output

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
    """The prompt behind a system message, if there is one; raises OptionError for ids."""
    if system is None:
        return prompt
    if not isinstance(prompt, str):
        raise OptionError("--system is a message before a text; give --prompt, or leave --system out")
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def generate_command(args: argparse.Namespace) -> None:
    """Answer a prompt, or a file of prompts."""
    check_output(args.trace, TRACE, "choose another file for the trace")
    if args.prompts is not None:
        return generate_all(args, [with_system(prompt, args.system) for prompt in read_lines(args.prompts)])
    prompt = with_system(read_prompt(args), args.system)
    with opened(args) as model, Trace(args.trace) as trace:
        policy, given = model.resolve(policy_of(args), given_options(args))
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


def generate_all(args: argparse.Namespace, prompts: list[str]) -> None:
    """Answer the prompts of a file, as many side by side as the bundle was built for."""
    if args.image:
        raise OptionError("--image belongs to one prompt; give --prompt, or leave --image out")
    if args.stream:
        raise OptionError("--stream shows one answer as it comes; give --prompt, or leave --stream out")
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


def read_lines(path: Path) -> list[str]:
    """The lines of a file, or of standard input for -, that are not blank; raises PromptError."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        return [line for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise PromptError(f"cannot read prompts from {path} ({error.strerror}); check the path") from error
    except UnicodeError as error:
        raise PromptError(f"{path} holds no text ({error}); write one prompt per line, as UTF-8") from error
