"""The vision parts in eager PyTorch, on the model's device and in its element type."""

import torch

from engines.eager import vision_layers as parts
from engines.eager.model import EagerModel
from engines.model import Model
from engines.vision import Rows, Vision


class EagerVision(Vision):
    """Tower and projector as tensors; their weights are read from the bundle when this is made."""

    def __init__(self, model: Model):
        super().__init__(model)
        assert isinstance(model, EagerModel)
        self.torch_device, self.dtype = model.torch_device, model.dtype
        self.weights = {part: model.read_weights(part) for part in model.config.vision_parts}

    @property
    def newline(self) -> Rows:
        return self.weights["projector"]["newline"].float().cpu().numpy()

    @torch.inference_mode()
    def tower(self, pixels: Rows) -> Rows:
        with self.model.timed("tower"):
            values = torch.from_numpy(pixels).to(self.torch_device, self.dtype)
            return parts.tower(self.config, self.weights["tower"], values).float().cpu().numpy()

    @torch.inference_mode()
    def projector(self, features: Rows) -> Rows:
        with self.model.timed("projector"):
            values = torch.from_numpy(features).to(self.torch_device, self.dtype)
            return parts.projector(self.weights["projector"], values).float().cpu().numpy()

    def close(self) -> None:
        self.weights.clear()
