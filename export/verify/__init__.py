"""Parity with eager PyTorch: of a back end, or of the exported graphs.

Two comparisons, because neither can replace the other:

- `parts` runs a back end's own runner layer by layer, each part on the
  reference's inputs, and then the plain forward. It is what decodes, so it also
  covers bindings, caches that are written in place, batching by slot, the drift
  test and the probe in a reuse pass. It sees hidden states, logits, sigma and
  probes, and needs the back end's hardware.
- `graphs` runs each exported graph by itself in ONNX Runtime on the CPU, through
  Polygraphy's runners. It compares every output, K, V and Q included, and checks
  names, types and shapes of the inputs; it covers what TensorRT compiles before
  there is a GPU, and holds one part in memory instead of two models.

Polygraphy cannot do the first: OnnxrtRunner and TrtRunner give every output
memory of its own, but the caches of a layer's engine must be written in place
(TensorRT's KV_CACHE_UPDATE requires input and output at one address), and
weights, which are inputs of these engines, would be copied to the GPU in every
run. Its CompareFunc is not used either: a tolerance that grows with the
reference's largest number has to be passed for each output, and on logits
[48, 126464] its statistics with cosine take 2.3 s and 360 MB, ours 0.7 s and
160 MB.
"""

import importlib
from collections.abc import Iterator

from engines.bundle import Bundle
from engines.errors import INSTALL, BackendError, OptionError, ParityError
from engines.registry import REFERENCE
from export.verify import parts
from export.verify.difference import Difference

GRAPHS = "graphs"  # in place of a back end: the exported graphs
TOLERANCES = {"fp32": 5e-4, "fp16": 5e-4, "bf16": 5e-4, "int8": 5e-2, "int4": 0.5}  # of engines, by stored weights
GRAPH_TOLERANCES = {"fp32": 5e-4, "fp16": 2e-3}  # by precision: half precision rounds every intermediate value


def tolerance(bundle: Bundle, backend: str) -> float:
    """The default tolerance for a back end of the bundle, or for its graphs."""
    if backend == GRAPHS:
        return GRAPH_TOLERANCES.get(bundle.manifest.precision, max(GRAPH_TOLERANCES.values()))
    weights = bundle.manifest.engines.get(backend, {}).get("weights")
    return TOLERANCES[weights or bundle.manifest.precision]


def verify(bundle: Bundle, backend: str, atol: float, seed: int = 0) -> Iterator[Difference]:
    """Yield the differences of a back end (or of GRAPHS) part by part, on random inputs from `seed`.

    Raises OptionError for options that do not apply, BackendError where the back
    end cannot run, and ParityError after the last part if one differs by more
    than `atol` times its scale.
    """
    if not atol > 0:
        raise OptionError(f"atol must be positive, got {atol}")
    if backend == REFERENCE:
        raise OptionError(f"{REFERENCE} is the reference itself; verify another back end")
    found = graph_differences(bundle, seed) if backend == GRAPHS else parts.differences(bundle, backend, seed)
    beyond = []
    for difference in found:
        if not difference.within(atol):
            beyond.append(difference)
        yield difference
    if beyond:
        worst = max(beyond, key=lambda difference: difference.max / difference.scale)
        raise ParityError(
            f"{len(beyond)} parts of {bundle.root} differ from {REFERENCE} by more than {atol:g} on {backend}, the "
            f"worst is {worst.part} by {worst.max:.3g} where numbers reach {worst.scale:.3g}; "
            f"{bundle.rebuild('--force')}, or report it with what `inspect --json` prints"
        )


def graph_differences(bundle: Bundle, seed: int) -> Iterator[Difference]:
    """`graphs.differences`; raises BackendError where a package that only this comparison needs is missing."""
    try:
        graphs = importlib.import_module("export.verify.graphs")
    except ImportError as error:
        remedy = INSTALL.format(extra="export,cpu")
        raise BackendError(f"verifying graphs needs {error.name}, which is not installed; {remedy}") from error
    yield from graphs.differences(bundle, seed)
