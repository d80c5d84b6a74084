"""The state of a prefix out of and into the caches of a sequence on a GPU; it stays on the device."""

from collections.abc import Iterator

import numpy as np

from engines.config import ModelConfig
from engines.gpu.cache import NAMES, DeviceCaches
from engines.gpu.cuda import Address, Cuda
from engines.gpu.staging import ControlBuffer
from engines.runner import PrefixState, Slots


class DeviceState(PrefixState):
    """The rows of a prefix in device memory: for each cache a dense block [layers, planes, rows, width]."""

    owner: Cuda

    @classmethod
    def read(cls, caches: DeviceCaches, batch_row: int, count: int) -> "DeviceState":
        """New memory with the first `count` slots of all caches and layers, whose copies are queued."""
        sizes = {name: caches.layers[name] * caches.planes[name] * count * caches.width[name] for name in NAMES}
        known = len(caches.cuda.owned)
        try:
            memory = {name: caches.cuda.alloc(size, f"{name.upper()} of a prefix") for name, size in sizes.items()}
        except BaseException:
            for address in caches.cuda.owned[known:]:
                caches.cuda.free(address)
            raise
        for (block, width), (cache, pitch), size, planes in blocks(caches, batch_row, memory, 0, count):
            caches.cuda.copy_rows(block, width, cache, pitch, size, planes)
        return cls(caches.cuda, memory, count, sum(sizes.values()))

    def write(self, caches: DeviceCaches, batch_row: int, slot: int) -> None:
        """Queue copies to the slots from `slot` on."""
        for (block, width), (cache, pitch), size, planes in blocks(
            caches, batch_row, self.of(caches.cuda), slot, self.rows
        ):
            caches.cuda.copy_rows(cache, pitch, block, width, size, planes)

    def free(self) -> None:
        self.owner.sync()
        for address in self.content.values():
            if address in self.owner.owned:  # unless the model is closed
                self.owner.free(address)


def blocks(
    caches: DeviceCaches, batch_row: int, memory: dict[str, Address], slot: int, count: int
) -> Iterator[tuple[tuple[Address, int], tuple[Address, int], int, int]]:
    """For each cache and layer: address and pitch of its block, of the slots from `slot` on, bytes of a row, rows."""
    for name in NAMES:
        width, planes = caches.width[name], caches.planes[name]
        for index in range(caches.layers[name]):
            block = memory[name] + index * planes * count * width
            cache = caches.at(name, index, batch_row) + slot * width
            yield (block, count * width), (cache, caches.slots * width), count * width, planes


class PrefixRows:
    """The part of a runner that reads and writes the rows of a prefix."""

    config: ModelConfig
    caches: DeviceCaches
    control: ControlBuffer
    length: int

    @property
    def batch_row(self) -> int:
        raise NotImplementedError

    def arrange(self, position_at: Slots) -> None:
        self.control.edit()
        self.control["positions"][:] = np.minimum(position_at, self.config.max_length - 1)
        self.control["key_mask"][:] = position_at < self.length

    def prefix_state(self, count: int) -> PrefixState:
        return DeviceState.read(self.caches, self.batch_row, count)

    def set_prefix_state(self, state: PrefixState, slot: int) -> None:
        assert isinstance(state, DeviceState)
        state.write(self.caches, self.batch_row, slot)
