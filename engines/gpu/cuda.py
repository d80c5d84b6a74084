"""Device memory, copies and graphs on one NVIDIA GPU, through cuda-python.

A thin layer over the few calls that the GPU back ends need, all of them on one stream. With it they run without
PyTorch, and tests replace it by a fake GPU.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import INSTALL, BackendError, DeviceError

Address = int  # in device memory, or of page-locked host memory
ALIGNMENT = 256  # bytes: TensorRT asks for it of every bound address, and allocations have it
LARGEST_PITCH = 2**31 - 1  # bytes from one row of a strided copy to the next, `cudaDeviceProp.memPitch`


def aligned(size: int) -> int:
    """`size` in bytes, rounded up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Cuda:
    """One GPU, and the stream on which all work is queued.

    Raises DeviceError if the machine has no such GPU, BackendError if cuda-python is missing.
    """

    def __init__(self, device: int = 0):
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise BackendError(
                f"GPU back ends need cuda-python, which is not installed; {INSTALL.format(extra='gpu')}"
            ) from error
        self.api: Any = runtime
        status, count = runtime.cudaGetDeviceCount()
        if status != runtime.cudaError_t.cudaSuccess or count <= device:
            reason = runtime.cudaGetErrorString(status)[1].decode() if status else f"it has {count}"
            raise DeviceError(
                f"no NVIDIA GPU {device} is usable on this machine ({reason}); install its driver, "
                "or use --backend onnxruntime"
            )
        self.device, self.thread = device, 0
        properties = self.call("cudaGetDeviceProperties", device)
        self.name: str = properties.name.decode()
        self.capability: tuple[int, int] = (properties.major, properties.minor)
        # A blocking stream would wait for the legacy stream, whose work in another thread breaks a capture.
        self.stream: int = int(self.call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking))
        self.owned: list[Address] = []
        self.hosts: set[Address] = set()  # the page-locked ones of `owned`
        self.waits = 0  # calls of `sync`
        self.capturing = False

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime API and return its result; raises BackendError if it does not succeed.

        The current device is a state of each thread, so it is set where a new one calls.
        """
        if threading.get_ident() != self.thread:
            self.thread = threading.get_ident()
            self.call("cudaSetDevice", self.device)
        status, *result = getattr(self.api, name)(*arguments)
        if status != self.api.cudaError_t.cudaSuccess:
            reason = self.api.cudaGetErrorString(status)[1].decode()
            raise BackendError(f"{name} failed on the GPU ({reason}); free the GPU or restart the process")
        return result[0] if result else None

    def alloc(self, size: int, what: str) -> Address:
        """Allocate `size` zeroed bytes on the device; raises BackendError, naming `what`, if they do not fit."""
        status, address = self.api.cudaMalloc(max(size, 1))
        if status != self.api.cudaError_t.cudaSuccess:
            free, total = self.memory()
            raise BackendError(
                f"out of GPU memory: {what} needs {size / 1e9:.2f} GB, {free / 1e9:.2f} of {total / 1e9:.2f} GB are "
                "free; close other programs, or decode fewer prompts at once"
            )
        self.owned.append(int(address))
        self.call("cudaMemsetAsync", address, 0, max(size, 1), self.stream)
        return int(address)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of device memory."""
        _, free, total = self.api.cudaMemGetInfo()
        return int(free), int(total)

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Allocate `size` zeroed bytes of page-locked host memory; copies to and from it do not block the host."""
        address = int(self.call("cudaMallocHost", max(size, 1)))
        self.owned.append(address)
        self.hosts.add(address)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        array[:] = 0
        return array

    def upload(self, target: Address, source: NDArray[Any]) -> None:
        """Queue a copy of a contiguous host array to the device; do not change the array before `sync`."""
        self._copy(target, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice")

    def download(self, target: NDArray[Any], source: Address) -> None:
        """Queue a copy to a contiguous host array; it holds the values after `sync`."""
        self._copy(target.ctypes.data, source, target.nbytes, "cudaMemcpyDeviceToHost")

    def copy(self, target: Address, source: Address, size: int) -> None:
        """Queue a copy of `size` bytes on the device."""
        self._copy(target, source, size, "cudaMemcpyDeviceToDevice")

    def _copy(self, target: Address, source: Address, size: int, kind: str) -> None:
        self.call("cudaMemcpyAsync", target, source, size, getattr(self.api.cudaMemcpyKind, kind), self.stream)

    def copy_rows(self, target: Address, target_pitch: int, source: Address, pitch: int, width: int, rows: int) -> None:
        """Queue a strided copy on the device: `rows` rows of `width` bytes, `pitch` bytes from one to the next.

        Rows farther apart than a strided copy can be are copied one by one.
        """
        if max(target_pitch, pitch) > LARGEST_PITCH:
            for row in range(rows):
                self.copy(target + row * target_pitch, source + row * pitch, width)
            return
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpy2DAsync", target, target_pitch, source, pitch, width, rows, kind, self.stream)

    def copy_planes(
        self, target: Address, target_pitch: int, target_height: int, source: Address, pitch: int, height: int,
        width: int, rows: int, planes: int,
    ) -> None:  # fmt: skip
        """Queue `copy_rows` for each of `planes` planes, `height * pitch` bytes from one to the next."""
        copy = self.api.cudaMemcpy3DParms()
        copy.dstPtr = self.api.make_cudaPitchedPtr(target, target_pitch, width, target_height)
        copy.srcPtr = self.api.make_cudaPitchedPtr(source, pitch, width, height)
        copy.extent = self.api.make_cudaExtent(width, rows, planes)
        copy.kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpy3DAsync", copy, self.stream)

    def sync(self) -> None:
        """Wait for all queued work."""
        self.waits += 1
        self.call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """Record the work that `work` queues as a CUDA graph, without running it.

        Raises BackendError where it cannot be recorded; the stream can be used as before then.
        """
        self.call(
            "cudaStreamBeginCapture", self.stream, self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        self.capturing = True
        try:
            work()
        except BaseException:
            # A capture that was broken ends with an error of its own, which must not hide the first.
            status, graph = self.api.cudaStreamEndCapture(self.stream)
            if status == self.api.cudaError_t.cudaSuccess and graph:
                self.api.cudaGraphDestroy(graph)
            raise
        finally:
            self.capturing = False
        graph = self.call("cudaStreamEndCapture", self.stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """Queue a captured graph."""
        self.call("cudaGraphLaunch", graph, self.stream)

    def destroy(self, graph: Any) -> None:
        """Free a graph that will not be launched again."""
        self.call("cudaGraphExecDestroy", graph)

    def free(self, address: Address) -> None:
        """Free memory from `alloc` or `pinned`."""
        self.owned.remove(address)
        self.call("cudaFreeHost" if address in self.hosts else "cudaFree", address)
        self.hosts.discard(address)

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Free all memory if the body fails, so that another back end or a second try can use the GPU."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Wait for queued work, then free all memory and the stream."""
        self.sync()
        while self.owned:
            self.free(self.owned[-1])
        self.call("cudaStreamDestroy", self.stream)
