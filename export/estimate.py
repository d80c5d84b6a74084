"""What a build will write, from shapes alone: weights are counted, and graphs are built in memory without weights."""

import math
from typing import TYPE_CHECKING

from engines.weights import SIZES, Entry
from export.checkpoint import tokenizer
from export.compilers import compiler
from export.job import BuildJob
from export.options import WEIGHTS

if TYPE_CHECKING:
    from export.part import Target

STAMP = 330  # bytes of a stamp
LISTED = 160  # bytes of a file in the manifest
TENSOR = 150  # bytes of a tensor in the manifest


def estimate(job: BuildJob) -> dict[str, int]:
    """Bytes on disk and the peak of memory that a build needs, about: {"disk", "memory"}. Reads no tensor."""
    from export.part import Target

    c = job.config
    exported = Target.exported(job.options.precision, c, job.capacity.track_num)
    compilers = [compiler(name) for name in job.backends]
    sizes: dict[str, int] = {}  # by file: targets may share some
    for target in (exported, *(other for one in compilers for other in one.targets(job))):
        sizes |= files(job, target)
    texts = [job.checkpoint.directory / "config.json", *tokenizer.sources(job.checkpoint.directory)]
    tensors = sum(len(signature.inputs) + len(signature.outputs) for signature in exported.signatures)
    disk = sum(sizes.values()) + sum(one.engine_bytes(job) for one in compilers)
    disk += sum(path.stat().st_size for path in texts) + len(sizes) * (STAMP + 2 * LISTED) + tensors * TENSOR
    return {"disk": disk, "memory": 2 * max(c.layer_numbers, c.vocab * c.d_model) * 4}


def files(job: BuildJob, target: "Target") -> dict[str, int]:
    """The bytes of each graph and weight file of a target, by its path below the bundle.

    The graph of the first layer stands for those of all layers with the same weights.
    """
    from export import graphs

    def shapes(part: str) -> dict[str, tuple[int, ...]]:
        return {name: weight.read_shape for name, weight in job.checkpoint.family.weights(job.config, part).items()}

    graph_sizes: dict[str, int] = {}  # by the weights of a part; one without any is of its own kind
    found = {}
    for signature in target.signatures:
        part = signature.name
        kind = str(list(shapes(part))) if part in target.config.parts else part
        if kind not in graph_sizes:
            entries = {
                source: (
                    {name: Entry(target.storage(source), s, 0, 0) for name, s in shapes(source).items()},
                    "",
                )
                for source in target.sources(part)
            }
            graph_sizes[kind] = graphs.build(signature, job.config, target.dtype, entries).ByteSize()
        found[target.graph_file(part)] = graph_sizes[kind]
        if weight_file := target.weight_file(part):
            found[weight_file] = sum(stored(target, part, shape) for shape in shapes(part).values())
    return found


def stored(target: "Target", part: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; of a quantised matrix, a block of 32 numbers along a column has a scale and a zero point."""
    if not target.quantised(part) or len(shape) < 2:
        return math.prod(shape) * SIZES[target.storage(part)]
    from export.graphs.quantize import BLOCK

    *stack, rows, columns = shape
    blocks = math.ceil(rows / BLOCK)
    bits = WEIGHTS[str(target.weights)]
    return math.prod(stack) * columns * (blocks * (BLOCK * bits // 8 + 4) + math.ceil(blocks * bits / 8))
