"""One build under way: what is built, and which files have been written so far."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.config import Capacity, ModelConfig
from export.options import BuildOptions, Progress
from export.stamps import Files

if TYPE_CHECKING:
    from export.checkpoint.reader import Checkpoint
    from export.part import Target


@dataclass(frozen=True)
class Sizes:
    """How many weights a model has and how a bundle stores them; what an estimate of disk space needs."""

    precision: str
    weights: str | None
    table: int  # weights of the embedding's matrix [V, d]
    language: int  # weights of the language model's matrices
    vision: int  # weights of the vision parts, which are never quantised


@dataclass
class BuildJob:
    """A planned build. Compilers read it and add the files they write to `files`.

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
    defaults: dict[str, Any] | None = None  # decoding defaults of the calibrated bundle that is extended

    @property
    def backends(self) -> list[str]:
        """The back ends to compile for."""
        assert self.options.backends is not None, "a planned build names its back ends"
        return self.options.backends

    @property
    def progress(self) -> Progress:
        """Called as progress(what, number, count) before each part is written."""
        return self.options.progress

    def write_parts(self, target: "Target", *others: "Target") -> dict[str, dict[str, Any]]:
        """Write the parts of `target`, and the weights of `others` from the same read of the checkpoint.

        Returns {part: {"graph", "weights"}} of `target`; the graphs of the others are
        written by `write_graphs`. Raises CheckpointError for a part that cannot be
        read or stored, OSError as the disk does.
        """
        from export.part import write_weights

        targets, config, written = (target, *others), self.config, {}
        for number, signature in enumerate(target.signatures, 1):
            self.progress(f"{target.folder}/{signature.name}", number, len(target.signatures))
            if signature.name in (*config.parts, *config.vision_parts):
                tensors = self.checkpoint.part(signature.name)
                key = self.checkpoint.digest(signature.name)
                self.files |= write_weights(self.root, signature.name, targets, tensors, key)
            written[signature.name] = self._write_graph(target, signature.name)
        return written

    def write_graphs(self, target: "Target") -> dict[str, dict[str, Any]]:
        """Write the graphs of `target` beside weights that `write_parts` has written; returns as it does."""
        written = {}
        for number, signature in enumerate(target.signatures, 1):
            self.progress(f"{target.folder}/{signature.name}", number, len(target.signatures))
            written[signature.name] = self._write_graph(target, signature.name)
        return written

    def _write_graph(self, target: "Target", part: str) -> dict[str, Any]:
        from export.part import write_graph

        self.files |= write_graph(self.root, target, part)
        return {"graph": target.graph_file(part), "weights": target.weight_file(part)}
