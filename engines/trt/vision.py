"""The vision parts on TensorRT: one plan each, weights on the GPU beside the model's.

Memory for one group of tiles is taken when the first image comes and kept.
Nothing here knows files of images or how tiles become tokens.
"""

import math
import time

import numpy as np

from engines.gpu.buffers import narrow, widen
from engines.model import Model
from engines.signatures.vision import vision_signatures
from engines.trt.model import TensorRTModel, TrtEngine
from engines.vision import Rows, Vision
from engines.weights import SIZES, locate


class TensorRTVision(Vision):
    """Tower and projector as deserialised plans, with memory for the ports of a group."""

    group = 8

    def __init__(self, model: Model):
        super().__init__(model)
        assert isinstance(model, TensorRTModel)
        self.cuda, self.precision = model.cuda, self.bundle.manifest.precision
        self.signatures = {signature.name: signature for signature in vision_signatures(model.config, self.precision)}
        self.weights = {part: model._upload(part) for part in self.signatures}
        self.plans = {part: self._load(model, part) for part in self.signatures}
        self.group = min(self.group, self.config.tiles)
        ports = {
            port.name: port
            for signature in self.signatures.values()
            for port in (*signature.inputs, *signature.outputs)
        }
        self.shapes = {name: tuple(int(axis) for axis in port.axes[1:]) for name, port in ports.items()}
        self.buffers = {
            name: self.cuda.alloc(self.group * math.prod(shape) * SIZES[self.precision], f"{name} of a group of tiles")
            for name, shape in self.shapes.items()
        }

    def _load(self, model: TensorRTModel, part: str) -> TrtEngine:
        name = next(iter(model.entry["parts"][part]["plans"].values()))  # the same for every length
        return model.load(part, name, [port.name for port in self.signatures[part].inputs])

    @property
    def newline(self) -> Rows:
        path = self.bundle.weights("projector")
        entry = locate(path)["newline"]
        return widen(np.memmap(path, np.uint8, "r", entry.offset, (entry.length,)), self.precision)

    def tower(self, pixels: Rows) -> Rows:
        return self._run("tower", pixels)

    def projector(self, features: Rows) -> Rows:
        return self._run("projector", features)

    def _run(self, part: str, given: Rows) -> Rows:
        began = time.perf_counter()
        (source,), (target,) = self.signatures[part].inputs, self.signatures[part].outputs
        read = {name: address for name, address in self.weights[part].items() if name != "newline"}
        for name in (source.name, target.name):
            read[name] = self.buffers[name], (len(given), *self.shapes[name])
        values = narrow(given, self.precision)
        self.cuda.upload(self.buffers[source.name], values)
        self.plans[part].run(0, read)
        found = np.empty((len(given), math.prod(self.shapes[target.name]) * SIZES[self.precision]), np.uint8)
        self.cuda.download(found, self.buffers[target.name])
        self.cuda.sync()
        self.model.seconds[part] += time.perf_counter() - began
        self.model.runs[part] += 1
        return widen(found, self.precision).reshape(len(given), *self.shapes[target.name])

    def close(self) -> None:
        """Give the memory of weights and ports back; closing twice does nothing."""
        self.plans.clear()
        held = [*self.buffers.values(), *(address for part in self.weights.values() for address, _ in part.values())]
        if held:
            self.cuda.sync()
        for address in held:
            self.cuda.free(address)
        self.buffers.clear()
        self.weights.clear()
