"""The vision parts in eager PyTorch: the reference on weights read from the bundle.

They lie where the model's own weights do, in the same element type. Nothing
here knows files of images or how tiles become tokens.
"""

import time

import torch
from torch import Tensor

from engines.eager import vision_layers as reference
from engines.eager.model import EagerModel
from engines.model import Model
from engines.vision import Rows, Vision


class EagerVision(Vision):
    """Tower and projector as tensors on the model's device."""

    def __init__(self, model: Model):
        super().__init__(model)
        assert isinstance(model, EagerModel)
        self.torch_device, self.dtype = model.torch_device, model.dtype
        self.weights = {part: model._read(part) for part in model.config.vision_parts}

    @property
    def newline(self) -> Rows:
        return self.weights["projector"]["newline"].float().cpu().numpy()

    @torch.inference_mode()
    def tower(self, pixels: Rows) -> Rows:
        began = time.perf_counter()
        given = torch.from_numpy(pixels).to(self.torch_device, self.dtype)
        return self._done("tower", reference.tower(self.config, self.weights["tower"], given), began)

    @torch.inference_mode()
    def projector(self, features: Rows) -> Rows:
        began = time.perf_counter()
        given = torch.from_numpy(features).to(self.torch_device, self.dtype)
        return self._done("projector", reference.projector(self.weights["projector"], given), began)

    def _done(self, part: str, found: Tensor, began: float) -> Rows:
        rows: Rows = found.float().cpu().numpy()  # waits for the device
        self.model.seconds[part] += time.perf_counter() - began
        self.model.runs[part] += 1
        return rows

    def close(self) -> None:
        self.weights.clear()
