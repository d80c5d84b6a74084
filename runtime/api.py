"""The Python interface: `runtime.load(bundle)` and what it returns.

    with runtime.load("bundle") as model:
        out = model.generate("What is …?", gen_length=256, policy=Elastic(window=32))

Text becomes ids here; everything below works on ids.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import registry
from engines.bundle import Bundle
from engines.errors import BundleError, OptionError
from engines.model import check_ids
from engines.options import UNSET, document_keywords
from engines.template import joined
from engines.vision import Vision, open_vision
from runtime.decoding.controller import StepEvent
from runtime.decoding.generate import Output, stream, stream_batch
from runtime.decoding.policies import DEFAULT, POLICIES, Policy, make_policy, unknown_defaults
from runtime.decoding.request import KEYWORDS, Request
from runtime.images.decode import Source
from runtime.images.decode import load as load_image
from runtime.images.prompt import IMAGE, encode, encode_image, mentioned, placeholder_ids
from runtime.text import Text

Prompt = Any  # a user's text, chat messages [{"role": …, "content": …}], or ids [P]


class Runtime:
    """A bundle loaded on a back end; a context manager, used by one thread at a time."""

    def __init__(self, bundle: Bundle, backend: str = "auto", **options: Any):
        unknown = unknown_defaults(bundle.manifest.defaults)
        if unknown:
            raise BundleError(
                f"{bundle.root}: its decoding defaults have unknown options {unknown}; correct "
                f"generation_config.json of the checkpoint, and {bundle.rebuild()}"
            )
        self.bundle = bundle
        self.model = registry.load(bundle, backend, **options)
        self.text = Text(bundle)
        self.vision: Vision | None = None  # opened for the first image

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release engines and memory."""
        if self.vision is not None:
            self.vision.close()
        self.model.close()

    @property
    def backend(self) -> str:
        """The name of the back end that runs the model."""
        return self.model.backend

    @property
    def has_text(self) -> bool:
        """Whether the bundle has a tokenizer."""
        return "tokenizer.json" in self.bundle.manifest.files

    @property
    def decode(self) -> Callable[[Any], str] | None:
        """Turns ids [n] into text, if the bundle has a tokenizer; None without one."""
        return self.text.decode if self.has_text else None

    def logits(self, ids: Any) -> NDArray[np.float32]:
        """The plain forward: int array [B, P] or [P] -> float32 [B, P, V]; raises as `engines.model.Model.logits`."""
        return self.model.logits(ids)

    def generate(
        self, prompt: Prompt, policy: str | Policy | None = None, images: Sequence[Source] = (), **options: Any
    ) -> Output:
        """Decode a prompt to the end.

        `prompt` is a user's text, chat messages, or ids [P]; `images` are files,
        bytes or Pillow images, one for each placeholder of the prompt, or in front of
        it. `policy` is a name or an instance such as `Elastic(window=32)`; `options`
        are those of the policy and of the request (`runtime.decoding.request`). For
        `elastic` and `timesteps`, an option that is not given has the bundle's default
        if there is one, else its own. Other policies and the request options have
        their own. UNSET counts as not given, None lifts a limit. `embeddings` [n, d],
        float32, are rows of the language model for ids of `prompt` beyond the
        vocabulary: id V + i is row i (V: size of the vocabulary). Raises OptionError
        for an option the policy does not use, PromptError for a prompt or an image
        that cannot be decoded.
        """
        *_, output = self.stream(prompt, policy, images, **options)
        assert isinstance(output, Output)
        return output

    def stream(
        self, prompt: Prompt, policy: str | Policy | None = None, images: Sequence[Source] = (), **options: Any
    ) -> Iterator[StepEvent | Output]:
        """Decode step by step: a StepEvent for each step, then the Output; arguments as of `generate`."""
        chosen, given = self.resolve(policy, options)
        return stream(self.model, self.request(prompt, images, given), chosen, self.decode)

    def generate_batch(
        self, prompts: Sequence[Prompt], policy: str | Policy | None = None, **options: Any
    ) -> list[Output]:
        """Decode several prompts to the end; arguments as of `stream_batch`."""
        done = {n: event for n, event in self.stream_batch(prompts, policy, **options) if isinstance(event, Output)}
        return [done[number] for number in range(len(prompts))]

    def stream_batch(
        self, prompts: Sequence[Prompt], policy: str | Policy | None = None, **options: Any
    ) -> Iterator[tuple[int, StepEvent | Output]]:
        """Decode several prompts side by side: (number of the prompt, StepEvent or Output), as each step ends.

        The tokens of a prompt are those that it has alone; arguments as of `generate`.
        Raises OptionError for more prompts than the bundle was built for.
        """
        if isinstance(prompts, str):
            raise OptionError("prompts are a list of texts, messages or ids; put the text into one")
        chosen, given = self.resolve(policy, options)
        return stream_batch(self.model, [self.request(prompt, (), given) for prompt in prompts], chosen, self.decode)

    def resolve(self, policy: str | Policy | None, options: Mapping[str, Any]) -> tuple[Policy, dict[str, Any]]:
        """The policy that `options` and the bundle's defaults make, and the options that belong to the request.

        Raises OptionError as `make_policy` does.
        """
        defaults = self.bundle.manifest.defaults
        given = {name: value for name, value in options.items() if value is not UNSET}
        own = {name: given.pop(name) for name in KEYWORDS if name in given}
        return make_policy(policy or defaults.get("policy", DEFAULT), given, defaults), own

    def request(self, prompt: Prompt, images: Sequence[Source | NDArray[np.float32]], given: dict[str, Any]) -> Request:
        """The request of a prompt: text as ids [P], each image as rows [n, d] with ids beyond the vocabulary."""
        is_text = isinstance(prompt, str) or (
            isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        )
        if isinstance(images, str | bytes | Path):
            raise OptionError("images are a list of files, bytes or Pillow's; put the image into one")
        if not images:
            return Request(self.text.prompt(prompt) if is_text else prompt, **given)
        began = time.perf_counter()
        rows = self.encode_images(images)
        seconds = time.perf_counter() - began
        vision, vocab = self.bundle.config.vision, self.bundle.config.vocab
        assert vision is not None, "`encode_images` has checked"
        if is_text:
            turns = [turn | {"content": joined(turn.get("content", ""))} for turn in self.text.messages(prompt)]
            text = self.text.render(mentioned(turns, vision.placeholder, len(images)))
            ids = encode(text, vision.placeholder, self.text.encode)
        else:
            ids = np.asarray(prompt)
            if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
                return Request(prompt, **given)  # refused with a reason when it is checked
        check_ids(ids[ids != IMAGE], vocab)
        given = given | {"embeddings": np.concatenate(rows), "image_seconds": seconds}
        return Request(placeholder_ids(ids, rows, vocab), **given)

    def encode_images(self, images: Sequence[Source | NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """The rows [n, d] of the language model for each image; an image that is rows already stays as it is.

        Raises OptionError for a model without a vision tower, PromptError for an image that cannot be decoded.
        """
        with self.model.exclusive():
            runner = self.vision = self.vision or open_vision(self.model)

            def seen(image: Source | NDArray[np.float32]) -> NDArray[np.float32]:
                return (
                    image if isinstance(image, np.ndarray) else encode_image(runner, load_image(runner.config, image))
                )

            return [seen(image) for image in images]


for method in (Runtime.generate, Runtime.stream, Runtime.generate_batch, Runtime.stream_batch):
    document_keywords(method, Request, *POLICIES.values())


def load(bundle: str | Path, backend: str = "auto", **options: Any) -> Runtime:
    """Load the bundle at a path.

    `options` are the back end's: `threads` (eager, ONNX Runtime), `provider` (ONNX
    Runtime), `device` (eager, TensorRT), `flavour` (TensorRT). Raises OptionError for
    others, BundleError for a bundle that is missing, incomplete or damaged,
    BackendError where the back end is not installed, DeviceError where its device is
    missing.
    """
    return Runtime(Bundle.open(bundle), backend, **options)
