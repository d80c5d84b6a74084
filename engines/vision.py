"""How the vision parts of a loaded model are run: pixel values in, rows of the language model out.

Each back end has a runner, one file each, imported and opened when the first
image comes: a model that sees none pays nothing for its tower. Tiles are run in
groups, for no tile sees another and memory is bounded. Nothing here knows files
of images, how tiles become tokens, or a policy.
"""

import importlib
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from engines.errors import OptionError
from engines.model import Model

Rows = NDArray[np.float32]
RUNNERS = {  # back end -> module and class, which takes the loaded model
    "eager": ("engines.eager.vision", "EagerVision"),
    "onnxruntime": ("engines.ort.vision", "OnnxRuntimeVision"),
    "tensorrt": ("engines.trt.vision", "TensorRTVision"),
}


class Vision(ABC):
    """The tower and the projector of a loaded model; used by one thread at a time, as the model is.

    Seconds and runs of the parts are counted with the model's own.
    """

    group = 4  # tiles run at once

    def __init__(self, model: Model):
        vision = model.config.vision
        assert vision is not None, "`open_vision` has looked"
        self.model, self.bundle, self.config = model, model.bundle, vision

    @property
    @abstractmethod
    def newline(self) -> Rows:
        """The row [d] that ends a row of an image's tokens."""

    @abstractmethod
    def tower(self, pixels: Rows) -> Rows:
        """pixels [N, C, S, S] of a group of tiles -> features [N, P, Dv]."""

    @abstractmethod
    def projector(self, features: Rows) -> Rows:
        """features [N, P, Dv] of a group of tiles -> rows [N, P, d]."""

    def project(self, pixels: Rows) -> Rows:
        """pixels [N, C, S, S] of any number of tiles -> rows [N, P, d] of the language model, in float32."""
        side = self.config.image_size
        assert pixels.shape[1:] == (self.config.channels, side, side), f"tiles are {pixels.shape}"
        if not len(pixels):
            return np.zeros((0, self.config.patches, self.model.config.d_model), np.float32)
        groups = range(0, len(pixels), self.group)
        done = [self.projector(self.tower(pixels[start : start + self.group])) for start in groups]
        return np.concatenate(done)

    def close(self) -> None:  # noqa: B027 (a runner may hold nothing of its own)
        """Give back what the runner holds beside the model."""


def open_vision(model: Model) -> Vision:
    """The runner of a loaded model's vision parts; raises OptionError if it has none."""
    if model.config.vision is None:
        raise OptionError(
            f"{model.bundle.root} is a bundle of a model without a vision tower; leave the image out, or build a "
            "checkpoint that has one"
        )
    module, name = RUNNERS[model.backend]
    runner: type[Vision] = getattr(importlib.import_module(module), name)
    return runner(model)
