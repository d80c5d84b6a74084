"""The vision parts on TensorRT: one engine each, with weights and buffers on the GPU beside the model's."""

import math

import numpy as np

from engines.gpu.buffers import narrow, widen
from engines.gpu.executor import REUSE, Bindings
from engines.model import Model
from engines.signatures.vision import vision_signatures
from engines.trt.engines import TrtEngine
from engines.trt.model import TensorRTModel
from engines.vision import Rows, Vision
from engines.weights import SIZES, locate


class TensorRTVision(Vision):
    """Tower and projector as engines, with one buffer for each of their inputs and outputs, of a group of tiles."""

    group = 8

    def __init__(self, model: Model):
        super().__init__(model)
        assert isinstance(model, TensorRTModel)
        self.cuda, self.precision, self.element = model.cuda, model.precision, SIZES[model.precision]
        self.signatures = {signature.name: signature for signature in vision_signatures(model.config, model.precision)}
        known = len(self.cuda.owned)
        self.weights = model.upload_weights(self.signatures)
        self.engines = {part: self._load_engine(model, part) for part in self.signatures}
        self.group = min(self.group, self.config.tiles)
        specs = [spec for signature in self.signatures.values() for spec in (*signature.inputs, *signature.outputs)]
        # Shape of one tile's part of each input and output, and the device memory of a group's.
        self.shapes = {spec.name: tuple(int(axis) for axis in spec.axes[1:]) for spec in specs}
        self.buffers = {
            name: self.cuda.alloc(self.group * math.prod(shape) * self.element, f"{name} of a group of tiles")
            for name, shape in self.shapes.items()
        }
        self.owned = self.cuda.owned[known:]

    def _load_engine(self, model: TensorRTModel, part: str) -> TrtEngine:
        name = next(iter(model.entry["parts"][part]["plans"].values()))  # the same for every length
        return model.load_engine(part, name, [spec.name for spec in self.signatures[part].inputs])

    @property
    def newline(self) -> Rows:
        path = self.bundle.file(self.bundle.engines(self.model.backend)["parts"]["projector"]["weights"])
        entry = locate(path)["newline"]
        return widen(np.memmap(path, np.uint8, "r", entry.offset, (entry.length,)), self.precision)

    def tower(self, pixels: Rows) -> Rows:
        return self._run("tower", pixels)

    def projector(self, features: Rows) -> Rows:
        return self._run("projector", features)

    def _run(self, part: str, values: Rows) -> Rows:
        """Run a part on a group of tiles [N, …] and wait for its output."""
        (source,), (target,) = self.signatures[part].inputs, self.signatures[part].outputs
        bindings: Bindings = {name: weight for name, weight in self.weights[part].items() if name != "newline"}
        for spec in (source, target):
            bindings[spec.name] = self.buffers[spec.name], (len(values), *self.shapes[spec.name])
        result = np.empty((len(values), math.prod(self.shapes[target.name]) * self.element), np.uint8)
        with self.model.timed(part):
            raw = narrow(values, self.precision)
            self.cuda.upload(self.buffers[source.name], raw)
            self.engines[part].run(REUSE, bindings)
            self.cuda.download(result, self.buffers[target.name])
            self.cuda.sync()
        return widen(result, self.precision).reshape(len(values), *self.shapes[target.name])

    def close(self) -> None:
        """Free weights and buffers; closing twice does nothing."""
        if self.owned:
            self.cuda.sync()
        while self.engines:
            self.engines.popitem()[1].close()
        while self.owned:
            self.cuda.free(self.owned.pop())
