"""The vision parts on ONNX Runtime's CPU provider, in fp32 as the other parts there.

Sessions share the process-wide thread pool and arena of `engines.ort.model`.
A model on a GPU runs them on the CPU too: its images are few. Nothing here knows
files of images or how tiles become tokens.
"""

import time
from functools import cached_property

import numpy as np
import onnxruntime as ort

from engines.model import Model
from engines.ort.model import share_threads, translated
from engines.vision import Rows, Vision
from engines.weights import locate


class OnnxRuntimeVision(Vision):
    """Tower and projector as sessions."""

    def __init__(self, model: Model):
        super().__init__(model)
        share_threads(None)
        self.sessions = {part: self._open(part) for part in model.config.vision_parts}

    def _open(self, part: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.add_session_config_entry("session.use_env_allocators", "1")
        path = self.bundle.graph(part, self.model.backend)
        with translated(part):
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    @cached_property
    def newline(self) -> Rows:
        path = self.bundle.file(self.bundle.engines(self.model.backend)["parts"]["projector"]["weights"])
        entry = locate(path)["newline"]
        with path.open("rb") as file:
            file.seek(entry.offset)
            return np.frombuffer(file.read(entry.length), np.float32)

    def tower(self, pixels: Rows) -> Rows:
        return self._run("tower", pixels=pixels)

    def projector(self, features: Rows) -> Rows:
        return self._run("projector", features=features)

    def _run(self, part: str, **feeds: Rows) -> Rows:
        began = time.perf_counter()
        with translated(part):
            (found,) = self.sessions[part].run(None, feeds)
        self.model.seconds[part] += time.perf_counter() - began
        self.model.runs[part] += 1
        return np.asarray(found)

    def close(self) -> None:
        self.sessions.clear()
