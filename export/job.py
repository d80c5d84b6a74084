"""One build under way: what is built, and which files have been written so far."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.config import Capacity, ModelConfig
from engines.errors import CheckpointError, RangeError
from engines.record import SHIPPED, Record
from export.options import BuildOptions, Progress, arguments
from export.stamps import Files

if TYPE_CHECKING:
    from export.checkpoint.reader import Checkpoint
    from export.half import HalfPass
    from export.part import Target


@dataclass
class BuildJob:
    """A planned build. Compilers read it and add the files they write to `files`.

    `root` is where files are written: the bundle of a plan, its folder `next/` once the build runs.
    `options` has the back ends to compile for; `config` and `capacity` have the
    checkpoint's numbers within the options' limits. `parts` maps each exported
    part to its manifest entry {"graph", "weights", …} once it is written.
    """

    options: BuildOptions
    root: Path
    checkpoint: "Checkpoint"
    config: ModelConfig
    capacity: Capacity
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: Files = field(default_factory=dict)
    half: "HalfPass | None" = None  # runs each part of an fp16 build in fp16
    defaults: dict[str, Any] | None = None  # decoding defaults of the calibrated bundle that is extended

    @property
    def backends(self) -> list[str]:
        """The back ends to compile for."""
        assert self.options.backends is not None, "a planned build names its back ends"
        return self.options.backends

    @property
    def record(self) -> Record:
        """What the bundle is built from."""
        name = str(self.options.checkpoint)
        return Record(
            checkpoint=name if name in SHIPPED else os.path.abspath(self.checkpoint.directory),
            arguments=arguments(self.options), length=self.checkpoint.config.max_length,
        )  # fmt: skip

    @property
    def progress(self) -> Progress:
        """Called as progress(what, number, count) before each part is written."""
        return self.options.progress

    def write_parts(self, target: "Target", *others: "Target") -> dict[str, dict[str, Any]]:
        """Write the parts of `target`, and the weights of `others` from the same read of the checkpoint.

        Returns {part: {"graph", "weights"}} of `target`; the graphs of the others are
        written by `write_graphs`. Raises CheckpointError for a part that cannot be
        read, stored or computed in the precision, OSError as the disk does.
        """
        written = {}
        for part in self._announced(target):
            self._write_weights(part, (target, *others))
            written[part] = self._write_graph(target, part)
        return written

    def write_graphs(self, target: "Target") -> dict[str, dict[str, Any]]:
        """Write the graphs of `target` beside weights that `write_parts` has written; returns as it does."""
        return {part: self._write_graph(target, part) for part in self._announced(target)}

    def _announced(self, target: "Target") -> Iterator[str]:
        """The names of a target's parts, each after a call of `progress`."""
        for number, signature in enumerate(target.signatures, 1):
            self.progress(f"{target.folder}/{signature.name}", number, len(target.signatures))
            yield signature.name

    def _write_weights(self, part: str, targets: "Sequence[Target]") -> None:
        from export.part import write_weights

        if part in (*self.config.parts, *self.config.vision_parts):
            tensors = self.checkpoint.part(part)  # freed before the next part is read
            try:
                self.files |= write_weights(self.root, part, targets, tensors, self.checkpoint.digest(part))
                if self.half is not None:
                    self.half.run(part, tensors)
            except RangeError as error:
                more = ("--bf16", "--force") if self.options.force else ("--bf16",)
                command = self.record.command(self.root.parent, *more)
                raise CheckpointError(f"{error}; build in another precision with `{command}`") from error

    def _write_graph(self, target: "Target", part: str) -> dict[str, Any]:
        from export.part import write_graph

        self.files |= write_graph(self.root, target, part)
        return {"graph": target.graph_file(part), "weights": target.weight_file(part)}
