"""Eager PyTorch: the reference of every other back end, and the baseline of every timing.

Runs the parts of `engines.eager.layers` on weights read from the bundle: on the
CPU in float32 (as the engines compiled for it do), on a GPU in the bundle's precision.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from engines.bundle import Bundle
from engines.config import layer_name
from engines.cores import default_threads
from engines.eager import layers as parts
from engines.model import Model, slots_for
from engines.runner import DriftInputs, LayerwiseRunner, PrefixState, Slots

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class EagerModel(Model):
    """The weights of all parts as tensors on one device.

    `threads` is PyTorch's number of CPU threads, which holds for the process;
    `device` is a name such as "cpu" or "cuda:1" (None: the first GPU, if there is one).
    """

    backend = "eager"

    def __init__(self, bundle: Bundle, threads: int | None = None, device: str | None = None):
        super().__init__(bundle)
        bundle.check(bundle.files_for(None))
        torch.set_num_threads(threads or default_threads())
        self.torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = DTYPES[bundle.manifest.precision if self.torch_device.type == "cuda" else "fp32"]
        self.weights = {part: self.read_weights(part) for part in self.config.parts}
        self.tables = tuple(
            table.to(self.torch_device)
            for table in parts.rotary_tables(self.config.max_length, self.config.rotated, self.config.rope_theta)
        )

    def read_weights(self, part: str) -> dict[str, Tensor]:
        """The weights of a part by their local names, on the model's device and in its element type."""
        stored = load_file(self.bundle.weights(part))
        return {name: tensor.to(self.torch_device, self.dtype) for name, tensor in stored.items()}

    @property
    def device(self) -> str:
        name = torch.cuda.get_device_name(self.torch_device) if self.torch_device.type == "cuda" else "CPU"
        return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"

    def new_runners(self, spans: list[tuple[int, int]]) -> Sequence["EagerRunner"]:
        return [EagerRunner(self, length, limit) for length, limit in spans]

    def layer(self, index: int, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Run one layer; `inputs` are those of `engines.eager.layers.layer` from `hidden` on."""
        return parts.layer(self.config, self.weights[layer_name(index)], self.tables, *inputs)  # type: ignore[arg-type]

    @torch.inference_mode()
    def forward(
        self, ids: NDArray[np.int64], rows: NDArray[np.int64] | None = None, block_length: int | None = None
    ) -> NDArray[np.float32]:
        """The plain forward of all sequences at once: ids [B, P] -> logits [B, P, V], or of `rows` only."""
        batch, length = ids.shape
        positions = torch.arange(length, device=self.torch_device).expand(batch, -1)
        mask = torch.ones(batch, length, dtype=torch.bool, device=self.torch_device)
        shape = batch, self.config.kv_heads, length, self.config.head_size
        k, v = (torch.empty(shape, dtype=self.dtype, device=self.torch_device) for _ in "kv")
        hidden = parts.embed(self.weights["embed"], torch.from_numpy(ids).to(self.torch_device))
        block = block_length or self.config.block_length
        blocks = () if block is None else (positions, ends_of_blocks(positions, block))
        for index in range(self.config.layers):
            hidden, _ = self.layer(index, hidden, positions, mask, 0, k, v, *blocks)
        hidden = hidden if rows is None else hidden[:, rows]
        return parts.head(self.config, self.weights["head"], hidden)[2].cpu().numpy()

    def close(self) -> None:
        super().close()
        self.weights.clear()


def ends_of_blocks(positions: Tensor, block_length: int) -> Tensor:
    """Where the block of each position ends: the keys before there are those that its row sees."""
    return (positions // block_length + 1) * block_length


class EagerRunner(LayerwiseRunner):
    """The cache of one sequence as tensors, with slots for `limit` positions and all rows of a reuse pass."""

    def __init__(self, model: EagerModel, length: int, limit: int):
        config = model.config
        super().__init__(config, length, slots_for(model.capacity, limit))
        self.model = model
        layers, slots, size = config.layers, self.slots, config.head_size

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=model.dtype, device=model.torch_device)

        # [L + 1, 1, S, d]
        self.h = zeros(layers + 1, 1, slots, config.d_model)
        # [L, 1, S, H, D]
        self.q = zeros(layers, 1, slots, config.heads, size)
        # [L, 1, G, S, D] each
        self.k = zeros(layers, 1, config.kv_heads, slots, size)
        self.v = zeros(layers, 1, config.kv_heads, slots, size)
        # [n, d]
        self.embeddings: Tensor | None = None
        # [1, S] each
        self.positions = torch.arange(slots, device=model.torch_device)[None]
        self.key_mask = self.positions < length

    def indices(self, slots: Slots) -> Tensor:
        """Slot numbers as a tensor on the model's device."""
        return torch.from_numpy(slots).to(self.model.torch_device)

    def grow(self, slots: Slots) -> None:
        self.length += len(slots)
        self.key_mask[:, self.indices(slots)] = True

    def arrange(self, position_at: Slots) -> None:
        self.positions = self.indices(position_at)[None]
        self.key_mask = self.positions < self.length

    @torch.inference_mode()
    def prefix_state(self, count: int) -> PrefixState:
        content = [
            self.h[1:-1, :, :count].clone(), self.q[:, :, :count].clone(), self.k[:, :, :, :count].clone(),
            self.v[:, :, :, :count].clone(),
        ]  # fmt: skip
        return PrefixState(self.model, content, count, sum(tensor.nbytes for tensor in content))

    @torch.inference_mode()
    def set_prefix_state(self, state: PrefixState, slot: int) -> None:
        h, q, k, v = state.of(self.model)
        at = slice(slot, slot + state.rows)
        self.h[1:-1, :, at], self.q[:, :, at], self.k[:, :, :, at], self.v[:, :, :, at] = h, q, k, v

    @torch.inference_mode()
    def permute(self, target: Slots, source: Slots) -> None:
        if len(target):
            new, old = self.indices(target), self.indices(source)
            for tensor in (self.h[:, 0], self.q[:, 0], self.positions):
                tensor[:, new] = tensor[:, old]
            for tensor in (self.k[:, 0], self.v[:, 0]):
                tensor[:, :, new] = tensor[:, :, old]

    def set_input_embeddings(self, embeddings: NDArray[np.float32]) -> None:
        self.embeddings = torch.from_numpy(embeddings).to(self.h)

    @torch.inference_mode()
    def embed(self, ids: Slots) -> None:
        known = np.minimum(ids, self.config.vocab - 1)
        self.h[0, :, : len(ids)] = parts.embed(self.model.weights["embed"], self.indices(known)[None])
        if self.embeddings is not None:
            rows = np.flatnonzero(ids >= self.config.vocab)
            self.h[0, 0, self.indices(rows)] = self.embeddings[self.indices(ids[rows] - self.config.vocab)]

    @torch.inference_mode()
    def layer(self, index: int, rows: int) -> None:
        positions = self.positions[:, :rows]
        blocks = () if self.block_length is None else (self.positions, ends_of_blocks(positions, self.block_length))
        hidden, q = self.model.layer(
            index, self.h[index, :, :rows], positions, self.key_mask, 0, self.k[index], self.v[index], *blocks
        )
        self.h[index + 1, :, :rows], self.q[index, :, :rows] = hidden, q

    @torch.inference_mode()
    def save_previous(self, index: int, rows: int, drift_inputs: DriftInputs) -> Any:
        return self.q[index][:, self.indices(drift_inputs.tracked)], self.k[index][:, :, :rows].clone()

    @torch.inference_mode()
    def drift(self, index: int, before: Any, drift_inputs: DriftInputs) -> float:
        q_prev, k_prev = before
        counted = torch.ones(q_prev.shape[:2], dtype=torch.bool, device=self.model.torch_device)
        q_now = self.q[index][:, self.indices(drift_inputs.tracked)]
        return float(parts.drift(drift_inputs.kind, q_prev, q_now, counted, k_prev, self.k[index], self.key_mask))

    @torch.inference_mode()
    def probe(self, index: int, drift_inputs: DriftInputs) -> Slots:
        window = self.q[index][:, self.indices(drift_inputs.window)]
        counted = torch.ones(window.shape[:2], dtype=torch.bool, device=self.model.torch_device)
        eligible = torch.from_numpy(drift_inputs.probe_keys)[None].to(self.model.torch_device)
        track_num = self.model.capacity.track_num
        return parts.probe(track_num, window, counted, self.k[index], self.key_mask, eligible)[0].cpu().numpy()

    @torch.inference_mode()
    def head(self, rows: Slots) -> tuple[Slots, NDArray[np.float32]]:
        token, confidence, _ = self._head(rows)
        return token[0].cpu().numpy(), confidence[0].cpu().numpy()

    @torch.inference_mode()
    def logits(self, rows: Slots) -> NDArray[np.float32]:
        return self._head(rows)[2][0].cpu().numpy()

    def hidden(self, index: int, rows: int) -> NDArray[np.float32]:
        return self.h[index, 0, :rows].float().cpu().numpy().copy()

    @torch.inference_mode()
    def set_hidden(self, index: int, hidden: NDArray[np.float32]) -> None:
        self.h[index, 0, : len(hidden)] = torch.from_numpy(hidden).to(self.h)

    def _head(self, rows: Slots) -> tuple[Tensor, Tensor, Tensor]:
        return parts.head(self.model.config, self.model.weights["head"], self.h[-1][:, self.indices(rows)])
