"""Engines for ONNX Runtime: the graphs of the CPU, and those of vision, in fp32.

ONNX Runtime optimises a graph when it loads it, so an engine is a graph and its
weights. On a CPU half precision takes twice the time of fp32; the weights of an
unquantised fp32 build serve as they are.
"""

from collections.abc import Sequence
from typing import Any

from engines.errors import INSTALL, BackendError
from engines.registry import installed
from engines.signatures.cpu import cpu_signatures
from engines.signatures.vision import vision_signatures
from export.compilers import Compiler
from export.job import BuildJob
from export.options import BuildOptions
from export.part import Target

FEW_BYTES = 1 << 27  # of weights: a model up to this size gets a reuse graph


class OnnxRuntimeCompiler(Compiler):
    """Writes graphs in fp32, quantised if `weights` says so; rows and slots stay dynamic."""

    name = "onnxruntime"

    def check(self, options: BuildOptions) -> None:
        if options.weights is not None and not installed("onnxruntime"):
            raise BackendError(f"--weights needs ONNX Runtime's quantizer; {INSTALL.format(extra='cpu')} brings it")

    def targets(self, job: BuildJob) -> Sequence[Target]:
        return (self.target(job),)

    def compile(self, job: BuildJob) -> dict[str, Any]:
        profiles = {"rows": [1, job.capacity.max_length], "slots": [1, job.capacity.max_length]}
        parts = job.write_graphs(self.target(job))
        return {"precision": "fp32", "weights": job.options.weights, "profiles": profiles, "parts": parts}

    def target(self, job: BuildJob) -> Target:
        """The parts to write.

        The reuse graph needs a second copy of the weights in memory.
        It is for small models, where a call of each part takes much of a step.
        """
        options, c = job.options, job.config
        small = 4 * (c.layers * c.layer_numbers + 2 * c.vocab * c.d_model) <= FEW_BYTES
        signatures = cpu_signatures(c, small and options.weights is None), vision_signatures(c, "fp32")
        folder = "onnx" if options.precision == "fp32" and options.weights is None else f"engines/{self.name}"
        return Target(
            folder=folder,
            dtype="fp32",
            precision=options.precision,
            config=c,
            signatures=(*signatures[0], *signatures[1]),
            weights=options.weights,
        )


COMPILER = OnnxRuntimeCompiler()
