"""The vision parts on ONNX Runtime's CPU provider, in fp32 as all parts there.

A model on a GPU runs them on the CPU, too: a prompt has few images.
"""

from functools import cached_property

import numpy as np

from engines.model import Model
from engines.ort.sessions import Sessions
from engines.vision import Rows, Vision
from engines.weights import locate


class OnnxRuntimeVision(Vision):
    """Tower and projector as sessions, on the process-wide pool of threads."""

    def __init__(self, model: Model):
        super().__init__(model)
        self.sessions = Sessions(self.bundle, model.backend, model.config.vision_parts, model.timed)

    @cached_property
    def newline(self) -> Rows:
        path = self.bundle.file(self.bundle.engines(self.model.backend)["parts"]["projector"]["weights"])
        entry = locate(path)["newline"]
        with path.open("rb") as file:
            file.seek(entry.offset)
            return np.frombuffer(file.read(entry.length), np.float32)

    def tower(self, pixels: Rows) -> Rows:
        return np.asarray(self.sessions.run("tower", None, pixels=pixels)[0])

    def projector(self, features: Rows) -> Rows:
        return np.asarray(self.sessions.run("projector", None, features=features)[0])

    def close(self) -> None:
        self.sessions.clear()
