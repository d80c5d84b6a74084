"""The Python interface: `runtime.load(bundle)` and what it returns.

    with runtime.load("bundle") as model:
        out = model.generate("What is …?", gen_length=256, policy=Elastic(window=32))

Text becomes ids here; everything below works on ids.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import registry
from engines.bundle import Bundle
from engines.errors import BundleError, OptionError, PromptError
from engines.model import check_ids
from engines.options import UNSET, document_keywords, within
from engines.template import joined
from engines.vision import Vision, open_vision
from runtime.decoding.events import StepEvent
from runtime.decoding.generate import Output, stream, stream_batch
from runtime.decoding.policies import DEFAULT, POLICIES, Elastic, Policy, make_policy, unknown_defaults
from runtime.decoding.prefix import PrefixCache
from runtime.decoding.request import KEYWORDS, OPTIONS, Request, check_request, unlike_padding, unpadded
from runtime.decoding.stops import Decode
from runtime.fill import Filler
from runtime.images.decode import Source
from runtime.images.decode import load as load_image
from runtime.images.prompt import IMAGE, encode, encode_image, mentioned, placeholder_ids
from runtime.images.tiling import mode_for
from runtime.shared import shared_ids
from runtime.text import Text

Prompt = Any  # a user's text, chat messages [{"role": …, "content": …}], or ids [P]


class Runtime(Filler):
    """A bundle loaded on a back end; a context manager, used by one thread at a time."""

    def __init__(self, bundle: Bundle, backend: str = "auto", prefix_cache: int | None = None, **options: Any):
        if unknown := unknown_defaults(bundle.manifest.defaults):
            raise BundleError(
                f"{bundle.root}: its decoding defaults have unknown options {unknown}; correct "
                f"generation_config.json of the checkpoint, and {bundle.rebuild('--force')}"
            )
        self.prefixes = None if prefix_cache is None else PrefixCache(prefix_cache)
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
        for kept in (self.vision, self.prefixes):
            if kept is not None:
                kept.close()
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
    def decode(self) -> Decode | None:
        """Turns ids [n] into text, if the bundle has a tokenizer; None without one."""
        return self.text.decode if self.has_text else None

    @cached_property
    def unused(self) -> tuple[int, ...]:
        """The ids of the vocabulary that no token of the tokenizer has."""
        if not self.has_text:
            return ()
        known = set(self.text.tokenizer.get_vocab().values())
        return tuple(token for token in range(self.bundle.config.vocab) if token not in known)

    def logits(self, ids: Any, block_length: int | None = None) -> NDArray[np.float32]:
        """The plain forward: int array [B, P] or [P] -> float32 [B, P, V]; raises as `engines.model.Model.logits`.

        `block_length` is that of block-causal attention (None: the model's own).
        """
        return self.model.logits(ids, block_length=block_length)

    def generate(
        self, prompt: Prompt, policy: str | Policy | None = None, images: Sequence[Source] = (),
        attention_mask: Any = None, **options: Any,
    ) -> Output:  # fmt: skip
        """Decode a prompt to the end.

        `prompt` is a user's text, chat messages, or ids [P]; padded ids need an
        `attention_mask` [P], 1 for ids and 0 for padding. `images` are files, bytes or
        Pillow images, one for each placeholder of the prompt, or in front of it.
        `policy` is a name or an instance such as `Elastic(window=32)`; `options` are
        those of the policy and of the request (`runtime.decoding.request`). For
        `elastic` and `timesteps`, an option that is not given has the bundle's default
        if there is one, else its own. Other policies and the request options have
        their own. UNSET counts as not given, None lifts a limit. `embeddings` [n, d],
        float32, are rows of the language model for ids of `prompt` beyond the
        vocabulary: id V + i is row i (V: size of the vocabulary). Raises OptionError
        for an option the policy does not use, PromptError for a prompt or an image
        that cannot be decoded.
        """
        *_, output = self.stream(prompt, policy, images, attention_mask, **options)
        assert isinstance(output, Output)
        return output

    def stream(
        self, prompt: Prompt, policy: str | Policy | None = None, images: Sequence[Source] = (),
        attention_mask: Any = None, **options: Any,
    ) -> Iterator[StepEvent | Output]:  # fmt: skip
        """Decode step by step: a StepEvent for each step, then the Output; arguments as of `generate`."""
        chosen, given = self.resolve(policy, options)
        request = self.request(prompt, images, given, attention_mask, chosen.name == Elastic.name)
        return stream(self.model, request, chosen, self.decode, prefixes=self.prefixes)

    def generate_batch(
        self, prompts: Sequence[Prompt], policy: str | Policy | None = None, attention_mask: Any = None, **options: Any
    ) -> list[Output]:
        """Decode several prompts to the end; arguments as of `stream_batch`."""
        events = self.stream_batch(prompts, policy, attention_mask, **options)
        done = {number: event for number, event in events if isinstance(event, Output)}
        return [done[number] for number in range(len(prompts))]

    def stream_batch(
        self, prompts: Sequence[Prompt], policy: str | Policy | None = None, attention_mask: Any = None, **options: Any
    ) -> Iterator[tuple[int, StepEvent | Output]]:
        """Decode several prompts side by side: (number of the prompt, StepEvent or Output), as each step ends.

        The tokens of a prompt are those that it has alone; arguments as of `generate`,
        with a row of `attention_mask` for each prompt. Raises OptionError for more
        prompts than the bundle was built for.
        """
        if isinstance(prompts, str):
            raise OptionError("prompts are a list of texts, messages or ids; put the text into one")
        masks = [None] * len(prompts) if attention_mask is None else attention_mask
        if len(masks) != len(prompts):
            raise PromptError(f"attention_mask has {len(masks)} rows for {len(prompts)} prompts; give one for each")
        chosen, given = self.resolve(policy, options)
        reuses, pairs = chosen.name == Elastic.name, zip(prompts, masks, strict=True)
        requests = [self.request(prompt, (), given, mask, reuses) for prompt, mask in pairs]
        return stream_batch(self.model, requests, chosen, self.decode, self.prefixes)

    def check_options(self, policy: str | Policy | None, options: Mapping[str, Any]) -> Request:
        """A request without a prompt; raises OptionError for options with which none could be decoded."""
        chosen, given = self.resolve(policy, options)
        request = Request((), **given)
        within("gen_length", request.gen_length, 1, self.bundle.capacity.max_length, "the bundle's length")
        chosen.check(self.bundle.capacity, request.gen_length)
        check_request(request, chosen, self.model, self.has_text)
        return request

    def resolve(self, policy: str | Policy | None, options: Mapping[str, Any]) -> tuple[Policy, dict[str, Any]]:
        """The policy that `options` and the bundle's defaults make, and the options that belong to the request.

        Raises OptionError as `make_policy` does.
        """
        defaults = self.bundle.manifest.defaults
        given = {name: value for name, value in options.items() if value is not UNSET}
        own = {name: given.pop(name) for name in KEYWORDS if name in given}
        return make_policy(policy or defaults.get("policy", DEFAULT), given, defaults), own

    def request(
        self, prompt: Prompt, images: Sequence[Source | NDArray[np.float32]], given: dict[str, Any],
        attention_mask: Any = None, reuses: bool = False,
    ) -> Request:  # fmt: skip
        """The request of a prompt: text as ids [P], each image as rows [n, d] with ids beyond the vocabulary.

        Where the policy `reuses` prefixes and they are kept, chat messages have one up to the last of them."""
        is_text = isinstance(prompt, str) or (
            isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        )
        if is_text and attention_mask is not None:
            raise PromptError("attention_mask belongs to ids, and the prompt is text; leave it out")
        if not is_text:
            config = self.bundle.config
            prompt = unlike_padding(prompt, config) if attention_mask is None else unpadded(prompt, attention_mask)
        given = given | {"unused": self.unused}
        if is_text and reuses and self.prefixes is not None and not images and "prefix" not in given:
            given |= {"prefix": shared_ids(self.text, prompt)}
        if isinstance(images, str | bytes | Path):
            raise OptionError("images are a list of files, bytes or Pillow's; put the image into one")
        if not images:
            return Request(self.text.prompt(prompt) if is_text else prompt, **given)
        began = time.perf_counter()
        rows = self.encode_images(images, given.get("image_layout", "auto"))
        seconds = time.perf_counter() - began
        vision, vocab = self.bundle.config.vision, self.bundle.config.vocab
        assert vision is not None, "`encode_images` has checked"
        if is_text:
            turns = [turn | {"content": joined(turn.get("content", ""))} for turn in self.text.messages(prompt)]
            text = self.text.render(mentioned(turns, vision.placeholder, len(images)))
            ids = encode(text, vision.placeholder, self.text.encode)
        else:
            ids = prompt
        check_ids(ids[ids != IMAGE], vocab)
        given = given | {"embeddings": np.concatenate(rows), "image_seconds": seconds}
        return Request(placeholder_ids(ids, rows, vocab), **given)

    def encode_images(
        self, images: Sequence[Source | NDArray[np.float32]], layout: str = "auto"
    ) -> list[NDArray[np.float32]]:
        """The rows [n, d] of the language model for each image; an image that is rows already stays as it is.

        `layout` is `tile`, `pad` or `auto`, which pads several images to one tile each. Raises OptionError for a model
        without a vision tower, PromptError for an image that cannot be decoded.
        """
        OPTIONS["image_layout"].check(layout)
        with self.model.exclusive():
            runner = self.vision = self.vision or open_vision(self.model)
            mode = mode_for(len(images), layout)

            def seen(image: Source | NDArray[np.float32]) -> NDArray[np.float32]:
                if isinstance(image, np.ndarray):
                    return image
                return encode_image(runner, load_image(runner.config, image, mode))

            return [seen(image) for image in images]


for method in (Runtime.generate, Runtime.stream, Runtime.generate_batch, Runtime.stream_batch, Runtime.fill):
    document_keywords(method, Request, *POLICIES.values())


def load(bundle: str | Path, backend: str = "auto", prefix_cache: int | None = None, **options: Any) -> Runtime:
    """Load the bundle at a path.

    `prefix_cache` is a number of bytes in which `elastic` keeps the states of all chat
    messages but the last (`runtime.decoding.prefix`). `options` are the back end's:
    `threads` (eager, ONNX Runtime), `provider` (ONNX Runtime), `device` (eager,
    TensorRT), `flavour` (TensorRT). Raises OptionError for others, BundleError for a
    bundle that is missing, incomplete or damaged, BackendError where the back end is
    not installed, DeviceError where its device is missing.
    """
    return Runtime(Bundle.open(bundle), backend, prefix_cache, **options)
