"""Parity of the exported graphs with eager PyTorch, one by one in ONNX Runtime on the CPU.

Polygraphy's Comparator runs both sides on the same random inputs; a side holds
the weights of its part only while that part runs.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.errors import OptionError
from engines.signatures import GraphSignature
from engines.signatures.gpu import gpu_signatures
from engines.signatures.vision import vision_signatures
from export.verify.difference import Difference
from export.verify.runners import DTYPES, Arrays, run_both

ROWS = 48  # active rows A at most


def differences(bundle: Bundle, seed: int = 0) -> Iterator[Difference]:
    """Compare every output of every exported graph; a layer runs on the reference's output of the layer before.

    Raises OptionError for a bf16 bundle, which NumPy cannot feed and ONNX Runtime
    cannot run on a CPU.
    """
    precision = bundle.manifest.precision
    if precision not in DTYPES:
        raise OptionError(f"ONNX Runtime cannot run {precision} graphs on a CPU; verify a back end's engines instead")
    signatures = (
        *gpu_signatures(bundle.config, precision, bundle.capacity.track_num),
        *vision_signatures(bundle.config, precision),
    )
    rng = np.random.default_rng(seed)
    carried: Arrays = {}
    for signature in signatures:
        feeds = inputs(bundle, signature, rng, carried)
        values, expected = run_both(bundle, signature, feeds)
        for name in expected:
            yield Difference.of(f"{signature.name} {name}", values[name], expected[name])
        for name in {"hidden", "hidden_out"} & set(expected):
            carried = {"hidden": expected[name]}


def inputs(bundle: Bundle, signature: GraphSignature, rng: np.random.Generator, carried: Arrays) -> Arrays:
    """Random inputs of a graph for two sequences; those in `carried` are taken from there.

    Of each mask so few keys are excluded that the probe finds enough.
    """
    config, capacity = bundle.config, bundle.capacity
    rows = min(ROWS, capacity.max_length)
    sizes = {"B": 2, "A": rows, "S": 2 * max(rows, capacity.track_num), "T": 6, "W": 6, "N": 2}
    length = config.max_length
    limits = {"ids": (0, config.vocab), "positions": (0, length), "rows": (0, rows)}
    limits |= {"key_positions": (0, length), "block_ends": (length // 2, length)}  # so that every row sees some keys

    def array(name: str, dtype: str, shape: list[int]) -> NDArray[Any]:
        if name in carried:
            return carried[name].astype(DTYPES[dtype])
        if name == "key_bias":
            return np.where(array("key_mask", "bool", shape), 0, -np.inf).astype(DTYPES[dtype])
        if dtype == "bool":
            excluded = min(shape[-1] // 5, max(0, shape[-1] - capacity.track_num) // 2)
            mask = np.ones(shape, np.bool_)
            mask[..., rng.permutation(shape[-1])[:excluded]] = False
            return mask
        if name == "write_index":
            return np.full(shape, rows // 2)
        if dtype == "int64":
            return rng.integers(*limits[name], shape)
        return rng.normal(size=shape).astype(DTYPES[dtype])

    return {
        spec.name: array(spec.name, spec.dtype, [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes])
        for spec in signature.inputs
    }
