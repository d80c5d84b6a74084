"""The Python interface: `runtime.load(bundle)` and what it returns.

    with runtime.load("bundle") as model:
        out = model.generate("What is …?", gen_length=256)

Text is turned into ids here; everything below sees ids only.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import registry as backends
from engines.bundle import Bundle
from engines.errors import OptionError
from engines.model import check_ids
from engines.vision import Vision, open_vision
from runtime.decoding.controller import StepEvent
from runtime.decoding.generate import Output, stream, stream_batch
from runtime.decoding.policies import make_policy
from runtime.decoding.policies.base import Policy
from runtime.decoding.request import Request
from runtime.images.decode import Source
from runtime.images.decode import load as load_image
from runtime.images.prompt import IMAGE, encode, encode_image, mentioned, placeholder_ids
from runtime.text import Text

REQUEST = tuple(field.name for field in fields(Request) if field.name not in ("prompt_ids", "image_seconds"))


class Runtime:
    """A bundle loaded on a back end; a context manager, used by one thread at a time."""

    def __init__(self, bundle: Bundle, backend: str = "auto", **options: Any):
        self.bundle = bundle
        self.model = backends.load(bundle, backend, **options)
        self.text = Text(bundle)
        self.vision: Vision | None = None  # opened for the first image

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back engines and memory."""
        if self.vision is not None:
            self.vision.close()
        self.model.close()

    @property
    def backend(self) -> str:
        return self.model.backend

    def logits(self, ids: Any) -> NDArray[np.float32]:
        """The plain full forward: int array [B, N] -> float32 [B, N, V]."""
        return self.model.logits(ids)

    def stream(
        self, prompt: str | list[dict[str, str]] | Any, policy: str | None = None, images: Sequence[Source] = (),
        **options: Any,
    ) -> Iterator[StepEvent | Output]:  # fmt: skip
        """Decode step by step: a StepEvent for each step, then the Output.

        `prompt` is a user's text, chat messages, or ids [P]; `images` are files,
        bytes or Pillow's, for the places that it has for them or else in front.
        Options are those of the policy (see `runtime.decoding.policies`) and of
        `runtime.decoding.generate.Request`; None means not given. Raises OptionError for one
        the policy does not use, PromptError for a prompt or an image that cannot be
        decoded.
        """
        chosen, given = self.resolve(policy, options)
        return stream(self.model, self.request(prompt, images, given), chosen, self.decode)

    def stream_batch(
        self, prompts: Sequence[Any], policy: str | None = None, **options: Any
    ) -> Iterator[tuple[int, StepEvent | Output]]:
        """Decode several prompts side by side: (number of the prompt, StepEvent or Output), as each step ends.

        The tokens of a prompt are those that it has alone; see `stream` for the
        arguments. Raises OptionError for more prompts than the bundle was built for.
        """
        if isinstance(prompts, str):
            raise OptionError("prompts are a list of texts, messages or ids; put the text into one")
        chosen, given = self.resolve(policy, options)
        return stream_batch(self.model, [self.request(prompt, (), given) for prompt in prompts], chosen, self.decode)

    def request(self, prompt: Any, images: Sequence[Source | NDArray[np.float32]], given: dict[str, Any]) -> Request:
        """What to decode: a text or messages as ids, and the rows that stand for images."""
        is_text = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], dict))
        if isinstance(images, str | bytes | Path):
            raise OptionError("images are a list of files, bytes or Pillow's; put the image into one")
        if not images:
            return Request(self.text.prompt(prompt) if is_text else prompt, **given)
        began = time.perf_counter()
        rows = self.encode_image(images)
        seconds = time.perf_counter() - began
        vision, vocab = self.bundle.config.vision, self.bundle.config.vocab
        assert vision is not None, "`see` has looked"
        if is_text:
            text = self.text.render(mentioned(prompt, vision.placeholder, len(images)))
            ids = encode(text, vision.placeholder, self.text.encode)
        else:
            ids = np.asarray(prompt)
            if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
                return Request(prompt, **given)  # which says what is wrong with it
        check_ids(ids[ids != IMAGE], vocab)
        given = given | {"embeddings": np.concatenate(rows), "image_seconds": seconds}
        return Request(placeholder_ids(ids, rows, vocab), **given)

    def encode_image(self, images: Sequence[Source | NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """The rows [n, d] of the language model that each image becomes; those that an earlier call gave stay.

        Raises OptionError for a model that sees none, PromptError for an image that cannot be decoded.
        """
        with self.model.exclusive():
            runner = self.vision = self.vision or open_vision(self.model)

            def seen(image: Source | NDArray[np.float32]) -> NDArray[np.float32]:
                return (
                    image if isinstance(image, np.ndarray) else encode_image(runner, load_image(runner.config, image))
                )

            return [seen(image) for image in images]

    @property
    def decode(self) -> Callable[[Any], str] | None:
        """Turns ids to text, if the bundle has a tokenizer."""
        return self.text.decode if self.has_text else None

    def resolve(self, policy: str | None, options: dict[str, Any]) -> tuple[Policy, dict[str, Any]]:
        """The policy that options and the bundle's defaults make, and the options that are the request's."""
        defaults = self.bundle.manifest.defaults
        given = {name: options[name] for name in REQUEST if options.get(name) is not None}
        rest = {name: value for name, value in options.items() if name not in REQUEST}
        return make_policy(policy or defaults.get("policy", "elastic"), rest, defaults), given

    @property
    def has_text(self) -> bool:
        return "tokenizer.json" in self.bundle.manifest.files

    def generate(
        self, prompt: str | list[dict[str, str]] | Any, policy: str | None = None, images: Sequence[Source] = (),
        **options: Any,
    ) -> Output:  # fmt: skip
        """Decode to the end; see `stream` for the arguments."""
        *_, output = self.stream(prompt, policy, images, **options)
        assert isinstance(output, Output)
        return output

    def generate_batch(self, prompts: Sequence[Any], policy: str | None = None, **options: Any) -> list[Output]:
        """Decode several prompts to the end; see `stream_batch` for the arguments."""
        done = {n: event for n, event in self.stream_batch(prompts, policy, **options) if isinstance(event, Output)}
        return [done[number] for number in range(len(prompts))]


def load(bundle: str | Path, backend: str = "auto", **options: Any) -> Runtime:
    """Load the bundle at a path. `options` are the back end's (`threads`).

    Raises BundleError for a bundle that is missing, incomplete or damaged,
    BackendError where the back end is not installed.
    """
    return Runtime(Bundle.open(bundle), backend, **options)
