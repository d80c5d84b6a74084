"""TensorRT engines with their execution contexts, and the scratch memory that all contexts share."""

from collections.abc import Hashable
from typing import Any

from engines.errors import BackendError
from engines.gpu.cuda import Address, Cuda
from engines.gpu.executor import Bindings
from engines.trt.contexts import ContextMaker


class ScratchMemory:
    """Device memory for intermediate results; all contexts share it, because runs follow each other on one stream."""

    def __init__(self, cuda: Cuda):
        self.cuda, self.address, self.size = cuda, 0, 0

    def reserve(self, size: int) -> tuple[Address, int]:
        """Address and size of a piece of at least `size` bytes.

        When a larger piece is needed, the smaller one stays allocated: captured graphs contain its address.
        """
        if size > self.size or not self.address:
            self.address, self.size = self.cuda.alloc(size, "scratch memory of engines"), size
        return self.address, self.size


class TrtEngine:
    """A deserialised engine and its execution contexts, one for each profile, batch size and place of a pass.

    A captured graph is valid only while its contexts keep their shapes and addresses, so no two share one. A context
    has no device memory of its own.
    """

    def __init__(
        self, name: str, engine: Any, inputs: list[str], scratch: ScratchMemory, contexts: ContextMaker,
        verify: str,
    ):  # fmt: skip
        """`inputs` names the engine's inputs, the first of which has the batch as its first axis.

        `contexts` makes contexts without memory of their own, `verify` is the command that checks the bundle.
        """
        self.name, self.engine, self.inputs, self.scratch, self.verify = name, engine, inputs, scratch, verify
        self.cuda, self.maker = scratch.cuda, contexts
        self.contexts: dict[Hashable, EngineContext] = {}

    def context(self, profile: int, batch: int, place: Hashable = None) -> "EngineContext":
        """The context for these, created at its first use; raises BackendError if it does not fit."""
        key = profile, batch, place
        if key not in self.contexts:
            context = self.maker.new(self.engine, profile)
            if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream):
                raise BackendError(
                    f"TensorRT cannot run {self.name} with profile {profile}: most likely the GPU's memory is full; "
                    "close other programs, or decode fewer prompts at once"
                )
            # The scratch of the largest profile may be 60 times that of a reuse pass.
            size = self.engine.get_device_memory_size_for_profile_v2(profile)
            context.set_device_memory(*self.scratch.reserve(size))
            self.contexts[key] = EngineContext(self.name, context, set(self.inputs), self.verify, self.cuda)
        return self.contexts[key]

    def close(self) -> None:
        """Destroy the contexts, also where an error's traceback still refers to one; no work may be queued."""
        while self.contexts:
            self.contexts.popitem()[1].context = None

    def run(self, profile: int, bindings: Bindings, place: Hashable = None) -> None:
        """Queue one run; raises BackendError if TensorRT refuses a shape or address, or fails."""
        (batch, *_) = bindings[self.inputs[0]][1]
        context = self.context(profile, batch, place)
        context.bind(bindings)
        context.enqueue(self.cuda.stream)


class EngineContext:
    """An execution context; only addresses and shapes that changed are set again."""

    def __init__(self, name: str, context: Any, inputs: set[str], verify: str, cuda: Cuda):
        self.name, self.context, self.inputs, self.verify, self.cuda = name, context, inputs, verify, cuda
        self.bound: Bindings = {}

    def bind(self, bindings: Bindings) -> None:
        """Set addresses and the shapes of inputs; raises BackendError if TensorRT refuses one."""
        for name, (address, shape) in bindings.items():
            old_address, old_shape = self.bound.get(name, (None, None))
            accepted = address == old_address or self.context.set_tensor_address(name, address)
            if name in self.inputs and shape != old_shape:
                accepted = accepted and self.context.set_input_shape(name, shape)
            if not accepted:
                raise BackendError(f"TensorRT refuses {name} {shape} of {self.name}; build the bundle again")
            self.bound[name] = address, shape

    def enqueue(self, stream: int) -> None:
        """Queue one run on `stream`; raises BackendError where it fails, or is captured and cannot be."""
        capturable = getattr(self.context, "is_stream_capturable", None)  # asked by TensorRT-RTX
        if self.cuda.capturing and capturable is not None and not capturable(stream):
            raise BackendError(f"TensorRT cannot run {self.name} in a CUDA graph")
        if not self.context.execute_async_v3(stream):
            raise BackendError(f"TensorRT failed on {self.name}; check it with `{self.verify}`")
