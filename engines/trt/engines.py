"""TensorRT engines with their execution contexts, and the scratch memory that all contexts share."""

from typing import Any

from engines.errors import BackendError
from engines.gpu.cuda import Address, Cuda
from engines.gpu.executor import Bindings


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
    """A deserialised engine and its execution contexts, one for each profile and batch size.

    A captured graph is valid only while its context keeps its shapes, so no two batch sizes share a context.
    """

    def __init__(
        self, name: str, engine: Any, inputs: list[str], scratch: ScratchMemory, user_managed: Any, verify: str
    ):  # fmt: skip
        """`inputs` names the engine's inputs, the first of which has the batch as its first axis.

        `user_managed` is TensorRT's constant for contexts without memory of their own, `verify` the command that
        checks the bundle.
        """
        self.name, self.engine, self.inputs, self.scratch, self.verify = name, engine, inputs, scratch, verify
        self.cuda, self.user_managed = scratch.cuda, user_managed
        self.contexts: dict[tuple[int, int], EngineContext] = {}

    def context(self, profile: int, batch: int) -> "EngineContext":
        """The context for `profile` and `batch`, created at its first use; raises BackendError if it does not fit."""
        if (profile, batch) not in self.contexts:
            context = self.engine.create_execution_context(self.user_managed)
            if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream):
                raise BackendError(
                    f"TensorRT cannot run {self.name} with profile {profile}: most likely the GPU's memory is full; "
                    "close other programs, or decode fewer prompts at once"
                )
            self.cuda.sync()
            context.set_device_memory(*self.scratch.reserve(self.engine.device_memory_size_v2))
            self.contexts[profile, batch] = EngineContext(self.name, context, set(self.inputs), self.verify)
        return self.contexts[profile, batch]

    def run(self, profile: int, bindings: Bindings) -> None:
        """Queue one run; raises BackendError if TensorRT refuses a shape or address, or fails."""
        (batch, *_) = bindings[self.inputs[0]][1]
        context = self.context(profile, batch)
        context.bind(bindings)
        context.enqueue(self.cuda.stream)


class EngineContext:
    """An execution context; only addresses and shapes that changed are set again."""

    def __init__(self, name: str, context: Any, inputs: set[str], verify: str):
        self.name, self.context, self.inputs, self.verify = name, context, inputs, verify
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
        """Queue one run on `stream`."""
        if not self.context.execute_async_v3(stream):
            raise BackendError(f"TensorRT failed on {self.name}; check it with `{self.verify}`")
