"""Eager PyTorch: the reference and the baseline of every timing.

Runs the reference parts on weights read from the bundle. On the CPU it computes
in float32 (as the engines compiled for it do), on a GPU in the bundle's
precision. Nothing here knows windows, gamma or text.
"""

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from engines.bundle import Bundle
from engines.config import layer_name
from engines.eager import layers as reference
from engines.model import Model, slots_for
from engines.runner import DriftInputs, LayerwiseRunner, Slots

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class EagerModel(Model):
    """The weights of all parts as tensors on one device."""

    backend = "eager"

    def __init__(self, bundle: Bundle, threads: int | None = None, device: str | None = None):
        super().__init__(bundle)
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        self.torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = DTYPES[bundle.manifest.precision if self.torch_device.type == "cuda" else "fp32"]
        self.weights = {part: self._read(part) for part in self.config.parts}
        self.tables = tuple(
            table.to(self.torch_device)
            for table in reference.rotary_tables(self.config.max_length, self.config.head_size, self.config.rope_theta)
        )

    def _read(self, part: str) -> dict[str, Tensor]:
        stored = load_file(self.bundle.weights(part))
        return {name: tensor.to(self.torch_device, self.dtype) for name, tensor in stored.items()}

    @property
    def device(self) -> str:
        where = torch.cuda.get_device_name(self.torch_device) if self.torch_device.type == "cuda" else "CPU"
        return f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"

    def new_runner(self, length: int, limit: int | None = None) -> "EagerRunner":
        return EagerRunner(self, length, limit or length)

    def layer(self, index: int, *inputs: Any) -> tuple[Tensor, Tensor]:
        return reference.layer(self.config, self.weights[layer_name(index)], self.tables, *inputs)  # type: ignore[arg-type]

    @torch.inference_mode()
    def forward(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        batch, length = ids.shape
        positions = torch.arange(length, device=self.torch_device).expand(batch, -1)
        mask = torch.ones(batch, length, dtype=torch.bool, device=self.torch_device)
        shape = batch, self.config.kv_heads, length, self.config.head_size
        k, v = (torch.empty(shape, dtype=self.dtype, device=self.torch_device) for _ in "kv")
        hidden = reference.embed(self.weights["embed"], torch.from_numpy(ids).to(self.torch_device))
        for index in range(self.config.layers):
            hidden, _ = self.layer(index, hidden, positions, mask, 0, k, v)
        return reference.head(self.config, self.weights["head"], hidden)[2].cpu().numpy()

    def close(self) -> None:
        super().close()
        self.weights.clear()


class EagerRunner(LayerwiseRunner):
    """The cache of one sequence as tensors."""

    def __init__(self, model: EagerModel, length: int, limit: int):
        config = model.config
        super().__init__(config, length, slots_for(model.capacity, limit))
        self.model = model
        layers, slots, size = config.layers, self.slots, config.head_size

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=model.dtype, device=model.torch_device)

        self.h = zeros(layers + 1, 1, slots, config.d_model)
        self.q = zeros(layers, 1, slots, config.heads, size)
        self.k = zeros(layers, 1, config.kv_heads, slots, size)
        self.v = zeros(layers, 1, config.kv_heads, slots, size)
        self.given: Tensor | None = None
        self.positions = torch.arange(slots, device=model.torch_device)[None]
        self.key_mask = self.positions < length

    def rows(self, slots: Slots) -> Tensor:
        return torch.from_numpy(slots).to(self.model.torch_device)

    def grow(self, slots: Slots) -> None:
        self.length += len(slots)
        self.key_mask[:, self.rows(slots)] = True

    @torch.inference_mode()
    def permute(self, target: Slots, source: Slots) -> None:
        if len(target):
            to, where = self.rows(target), self.rows(source)
            for tensor in (self.h[:, 0], self.q[:, 0], self.positions):
                tensor[:, to] = tensor[:, where]
            for tensor in (self.k[:, 0], self.v[:, 0]):
                tensor[:, :, to] = tensor[:, :, where]

    def set_input_embeddings(self, embeddings: NDArray[np.float32]) -> None:
        self.given = torch.from_numpy(embeddings).to(self.h)

    @torch.inference_mode()
    def embed(self, ids: Slots) -> None:
        known = np.minimum(ids, self.config.vocab - 1)
        self.h[0, :, : len(ids)] = reference.embed(self.model.weights["embed"], self.rows(known)[None])
        if self.given is not None:
            rows = np.flatnonzero(ids >= self.config.vocab)
            self.h[0, 0, self.rows(rows)] = self.given[self.rows(ids[rows] - self.config.vocab)]

    @torch.inference_mode()
    def layer(self, index: int, rows: int) -> None:
        hidden, q = self.model.layer(
            index, self.h[index, :, :rows], self.positions[:, :rows], self.key_mask, 0, self.k[index], self.v[index]
        )
        self.h[index + 1, :, :rows], self.q[index, :, :rows] = hidden, q

    @torch.inference_mode()
    def save_previous(self, index: int, rows: int, watch: DriftInputs) -> Any:
        return self.q[index][:, self.rows(watch.tracked)], self.k[index][:, :, :rows].clone()

    @torch.inference_mode()
    def drift(self, index: int, before: Any, watch: DriftInputs) -> float:
        q_prev, k_prev = before
        counted = torch.ones(q_prev.shape[:2], dtype=torch.bool, device=self.model.torch_device)
        q_now = self.q[index][:, self.rows(watch.tracked)]
        return float(reference.drift(watch.kind, q_prev, q_now, counted, k_prev, self.k[index], self.key_mask))

    @torch.inference_mode()
    def probe(self, index: int, watch: DriftInputs) -> Slots:
        window = self.q[index][:, self.rows(watch.window)]
        counted = torch.ones(window.shape[:2], dtype=torch.bool, device=self.model.torch_device)
        eligible = torch.from_numpy(watch.probe_keys)[None].to(self.model.torch_device)
        track_num = self.model.capacity.track_num
        return reference.probe(track_num, window, counted, self.k[index], self.key_mask, eligible)[0].cpu().numpy()

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
        return reference.head(self.model.config, self.model.weights["head"], self.h[-1][:, self.rows(rows)])
