"""Several sequences on a GPU, whose reuse passes run as one, so that weights are read once for all of them.

A pass of B sequences runs the first B places. So that a batch does not compute
for sequences that are over, the places of those that go on are brought to the
front, as the slots of an active set are; places between them that are idle are
run along, and what that writes there nothing reads. Only a few B are used, for
each has a graph. Nothing here knows a back end, windows, gamma or text.
"""

import math
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from engines.device_caches import Caches
from engines.device_parts import Parts, control_block, result_block
from engines.device_walk import DeviceWalk
from engines.walk import Pass, Reuse
from engines.weights import SIZES

if TYPE_CHECKING:
    from engines.device_model import DeviceModel


def size_of(count: int, places: int) -> int:
    """How many of `places` places a pass of `count` sequences runs: 2, 3, 4, 6, 8, 12, 16, …, or all."""
    sizes = (size for power in range(1, 64) for size in (1 << power, 3 << power - 1))
    return min(places, next(size for size in sizes if size >= count))


def walk_of(due: Pass) -> DeviceWalk:
    assert isinstance(due.walk, DeviceWalk)
    return due.walk


class Batch:
    """The walks at `places` places, which share one allocation of each cache."""

    def __init__(self, model: "DeviceModel", slots: int, places: int):
        config, capacity = model.config, model.capacity
        self.cuda, self.rows, known = model.cuda, capacity.rows, len(model.cuda.owned)
        self.layers, self.tracked, self.window = config.layers, capacity.track_num, capacity.window
        element = SIZES[model.bundle.manifest.precision]
        self.caches = Caches(self.cuda, config, capacity, element, slots, places)
        self.walks = [DeviceWalk(model, self.caches, place) for place in range(places)]
        rows = dict.fromkeys(("ids", "positions", "tracked", "window"), capacity.rows)
        self.widths = rows | {"key_mask": slots, "probe_keys": slots, "rows": capacity.window, "write_index": 1}
        self.control = control_block(self.cuda, places, self.widths)
        self.result = result_block(self.cuda, places, config.layers, capacity.track_num, capacity.window)
        self.parts = Parts(model, self.caches, self.control, self.result)
        self.owned = self.cuda.owned[known:]

    def start(self, lengths: list[int]) -> list[DeviceWalk]:
        """Begin sequences of these lengths; those that were under way are over."""
        for walk in self.walks:
            walk.end()
        chosen = self.walks[: len(lengths)]
        for walk, length in zip(chosen, lengths, strict=True):
            walk.start(length)
        return chosen

    def joins(self, passes: list[Pass]) -> bool:
        """Whether passes can run as one: captured ones with one drift test, none with given embeddings, and all
        sequences under way take part."""
        going = {id(walk) for walk in self.walks if not walk.idle}
        return (
            {id(due.walk) for due in passes} == going
            and len({due.watch.kind for due in passes}) == 1
            and all(walk_of(due).captured(due) and walk_of(due).given is None for due in passes)
        )

    def reuse(self, passes: list[Pass]) -> list[Reuse]:
        """Run passes that join: one upload, one launch and one wait for all of them."""
        kind, count = passes[0].watch.kind, size_of(len(passes), len(self.walks))
        self._close_up(count)
        for due in passes:
            walk_of(due).aim(due.watch)
        self._gather(count)
        self.parts.batch = count
        self.parts.replay((kind, count), lambda: self.parts.reuse(self.rows, kind, self.rows))
        self.result.fetch()
        sigma = self._result("sigma", self.layers, count)
        probe = self._result("probe", self.layers, count, self.tracked)
        token, confidence = (self._result(name, count, self.window) for name in ("token", "confidence"))
        places = [walk_of(due).place for due in passes]
        return [
            walk_of(due).learn(due, sigma[:, place], probe[:, place], token[place], confidence[place])
            for due, place in zip(passes, places, strict=True)
        ]

    def _close_up(self, count: int) -> None:
        """Have all sequences under way at the first `count` places."""
        free = [place for place, walk in enumerate(self.walks[:count]) if walk.idle]
        for place in range(count, len(self.walks)):
            if not self.walks[place].idle:
                self._exchange(free.pop(0), place)

    def _exchange(self, target: int, source: int) -> None:
        """Move a sequence to a place that is idle; the idle walk gets the place it leaves."""
        walk, idle = self.walks[source], self.walks[target]
        walk.relocate(target)
        idle.place = source
        self.walks[target], self.walks[source] = walk, idle

    def _gather(self, count: int) -> None:
        """Send what the walks at the first places are to be told."""
        self.control.edit()
        for name, width in self.widths.items():
            told = self.control[name][: count * width].reshape(count, width)
            for place, walk in enumerate(self.walks[:count]):
                told[place] = walk.control[name][:width]
        self.control.send()

    def _result(self, name: str, *shape: int) -> NDArray[Any]:
        """What a pass said: results of fewer sequences than there are places take the first part of an array."""
        return self.result[name][: math.prod(shape)].reshape(shape)

    def release(self) -> None:
        """Give the memory and the graphs back; walks and passes cannot be used any more."""
        self.cuda.sync()
        for walk in self.walks:
            walk.end()
        for parts in (self.parts, *(walk.parts for walk in self.walks)):
            parts.release()
        for address in self.owned:
            self.cuda.free(address)
