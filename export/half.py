"""fp16 that overflows: a model's parts in eager PyTorch on probe texts, every operation rounded to fp16.

ONNX Runtime computes fp16 in fp32 on a CPU, so neither a run nor a comparison
there shows that a GPU would compute NaN. A build in fp16 runs each part while its
tensors are in memory; `verify --half` runs those of a bundle.
"""

import math
from collections.abc import Iterator

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from engines.bundle import Bundle
from engines.config import ModelConfig
from engines.eager import layers, vision_layers
from engines.errors import CheckpointError, OptionError, RangeError

LARGEST = torch.finfo(torch.float16).max
TEXT = "What is 17 + 25?\ndef f(x):\n    return [x ** 2, 1e-5]\nGröße, Δt ≤ 3; 北京 🙂\nTom has 10 pens. 中文 #### 42"
IDS = 40  # of the text at most
SPECIAL = 16  # of the tokenizer's special tokens at most
MASKS = 8
COLUMNS = 1 << 13  # of the head's matrix at a time


class HalfPass:
    """A plain forward pass in fp16, part by part in their order; holds what a part hands to the next."""

    def __init__(self, config: ModelConfig, ids: list[int]):
        """`ids` are the rows that pass through, at most as many as the model's length."""
        self.config, self.ids = config, torch.tensor([ids])
        self.positions = torch.arange(len(ids))[None]
        self.tables = layers.rotary_tables(len(ids), config.rotated, config.rope_theta)
        self.output = torch.empty(0, dtype=torch.float16)  # of the last part

    @torch.inference_mode()
    def run(self, part: str, tensors: dict[str, Tensor]) -> float:
        """The largest magnitude that `part` puts out with its `tensors`, matrices as [in, out].

        Raises RangeError, which names the part and no remedy, where numbers leave the range of fp16.
        """
        kind = part.partition("_")[0]
        largest = self._head(tensors) if kind == "head" else self._largest_of(kind, tensors)
        if not math.isfinite(largest):
            raise RangeError(
                f"{part}: activations leave the range of fp16 (±{LARGEST:.0f}) on the probe texts, and a GPU would "
                "compute NaN"
            )
        return largest

    def _largest_of(self, kind: str, tensors: dict[str, Tensor]) -> float:
        """Run a part that is not the head; its output becomes the next part's input."""
        config, vision = self.config, self.config.vision
        if kind == "embed":
            self.output = layers.embed(tensors, self.ids).half()
            return _largest(self.output)
        weights = {name: _half(tensor) for name, tensor in tensors.items()}
        if kind == "layer":
            shape = 1, config.kv_heads, len(self.ids[0]), config.head_size
            k, v = (torch.zeros(shape, dtype=torch.float16) for _ in "kv")
            seen = torch.ones_like(self.ids, dtype=torch.bool)
            self.output, _ = layers.layer(
                config, weights, self.tables, self.output, self.positions, seen, 0, k, v
            )  # fmt: skip
        elif kind == "tower":
            assert vision is not None
            tiles = torch.linspace(-1, 1, vision.channels * vision.image_size**2, dtype=torch.float16)
            self.output = vision_layers.tower(vision, weights, tiles.view(1, vision.channels, vision.image_size, -1))
        else:
            self.output = vision_layers.projector(weights, self.output)
        return _largest(self.output)

    def _head(self, tensors: dict[str, Tensor]) -> float:
        """The largest magnitude of the logits, some columns at a time: the matrix is the largest of a model."""
        normed = layers.rms_norm(self.output, tensors["ln_f.weight"].half(), self.config.norm_eps)
        found = []
        for start in range(0, self.config.vocab, COLUMNS):
            columns = {
                name: _half(tensor[..., start : start + COLUMNS])
                for name, tensor in tensors.items()
                if name.startswith("ff_out.")
            }
            found.append(_largest(layers.linear(columns, "ff_out", normed)))
        return math.nan if any(map(math.isnan, found)) else max(found)


def probe_ids(config: ModelConfig, tokenizer: bytes | None) -> list[int]:
    """Ids that a part is tried on: special tokens, a text of several scripts, and masks.

    `tokenizer` is the content of tokenizer.json; without it, ids from the whole
    vocabulary stand for the text. Raises CheckpointError for a tokenizer that cannot
    be read.
    """
    if tokenizer is None:
        ids = [number * config.vocab // IDS for number in range(IDS)]
    else:
        try:
            found = Tokenizer.from_buffer(tokenizer)
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"tokenizer.json is not a tokenizer that can be read ({error})") from error
        ids = [*sorted(found.get_added_tokens_decoder())[:SPECIAL], *found.encode(TEXT).ids[:IDS]]
    known = [config.eos_id, *(number for number in ids if number < config.vocab)]
    return [*known, *[config.mask_id] * MASKS][-config.max_length :]


def verify_half(bundle: Bundle) -> Iterator[tuple[str, float]]:
    """Yield each part of an fp16 bundle and the largest magnitude that it puts out in fp16.

    Raises OptionError for a bundle in another precision, CheckpointError for the
    first part that overflows.
    """
    if bundle.manifest.precision != "fp16":
        raise OptionError(f"{bundle.root} is in {bundle.manifest.precision}; --half is for bundles in fp16")
    tokenizer = "tokenizer.json"
    content = bundle.file(tokenizer).read_bytes() if tokenizer in bundle.manifest.files else None
    forward = HalfPass(bundle.config, probe_ids(bundle.config, content))
    for part in (*bundle.config.parts, *bundle.config.vision_parts):
        try:
            yield part, forward.run(part, load_file(bundle.weights(part)))
        except RangeError as error:
            raise RangeError(f"{error}; {bundle.rebuild('--bf16', '--force')}") from error


def _half(tensor: Tensor) -> Tensor:
    """A tensor in fp16; a matrix by columns, for which PyTorch's product on a CPU is 80 times faster."""
    half = tensor.half()
    return half.t().contiguous().t() if half.dim() == 2 and half.stride(1) == 1 else half


def _largest(values: Tensor) -> float:
    """The largest magnitude, NaN where one number is NaN."""
    return float(values.abs().max())
