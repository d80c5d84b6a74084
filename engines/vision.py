"""The contract of the vision parts of a loaded model: tiles in, input embeddings of the language model out.

Each back end has one implementation, in a file that is imported when the first image comes, so text alone does not
pay for the tower. Tiles do not depend on each other; they run in groups, which bounds memory.
Axis letters: see `engines.signatures`.
"""

import importlib
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from engines.errors import OptionError
from engines.model import Model

Rows = NDArray[np.float32]
IMPLEMENTATIONS = {  # back end -> module and class, which takes the loaded model
    "eager": ("engines.eager.vision", "EagerVision"),
    "onnxruntime": ("engines.ort.vision", "OnnxRuntimeVision"),
    "tensorrt": ("engines.trt.vision", "TensorRTVision"),
}


class Vision(ABC):
    """The tower and the projector of a loaded model; like the model, one thread uses it at a time.

    An implementation counts seconds and runs of both parts in the model, through `Model.timed`.
    """

    group = 4  # tiles that run at once

    def __init__(self, model: Model):
        assert model.config.vision is not None, "open_vision refuses a model without a vision tower"
        self.model, self.bundle, self.config = model, model.bundle, model.config.vision

    @property
    @abstractmethod
    def newline(self) -> Rows:
        """The embedding [d] that ends a row of an image's tokens."""

    @abstractmethod
    def tower(self, pixels: Rows) -> Rows:
        """Run the tower on a group of tiles: pixels [N, C, Y, X] -> features [N, P, E]."""

    @abstractmethod
    def projector(self, features: Rows) -> Rows:
        """Run the projector on a group of tiles: features [N, P, E] -> embeddings [N, P, d]."""

    def project(self, pixels: Rows) -> Rows:
        """Turn any number of tiles into input embeddings: pixels [N, C, Y, X] -> float32 [N, P, d]."""
        size = self.config.image_size
        assert pixels.shape[1:] == (self.config.channels, size, size), f"tiles are {pixels.shape}"
        if not len(pixels):
            return np.zeros((0, self.config.patches, self.model.config.d_model), np.float32)
        groups = range(0, len(pixels), self.group)
        return np.concatenate([self.projector(self.tower(pixels[at : at + self.group])) for at in groups])

    def close(self) -> None:  # noqa: B027 (an implementation may hold nothing beside the model)
        """Free what is held beside the model."""


def open_vision(model: Model) -> Vision:
    """Open the vision parts of a loaded model; raises OptionError if it has none."""
    if model.config.vision is None:
        raise OptionError(
            f"{model.bundle.root} is a bundle of a model without a vision tower; leave the image out, or build a "
            "checkpoint that has one"
        )
    module, name = IMPLEMENTATIONS[model.backend]
    implementation: type[Vision] = getattr(importlib.import_module(module), name)
    return implementation(model)
