"""Quantisation of a part's matrices with ONNX Runtime's own quantizer.

Blocks of 32 weights share a scale and a zero point. Activations are stored in
fp32, and taken in eight bits, block by block, where the processor multiplies
these faster. Tables that are looked up, norms and biases keep their type.
"""

import logging
from pathlib import Path

import onnx

BLOCK = 32
INT8 = 4  # what the quantizer calls products of eight-bit activations


def version() -> str:
    """Of the quantizer."""
    import onnxruntime

    return str(onnxruntime.__version__)


def quantize(source: Path, target: Path, data: Path, bits: int) -> None:
    """Write the graph `source` with its matrices in `bits` bits: the graph to `target`, what is large to `data`.

    Raises ImportError where ONNX Runtime's quantizer is not installed.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(
        onnx.load(str(source)), bits=bits, block_size=BLOCK, is_symmetric=False, accuracy_level=INT8
    )
    quantizer.process()
    data.unlink(missing_ok=True)  # onnx appends to a file that is there
    onnx.save(
        quantizer.model.model, str(target), save_as_external_data=True, all_tensors_to_one_file=True,
        location=data.name, size_threshold=1024,
    )  # fmt: skip
    data.chmod(target.stat().st_mode)  # else for its owner only
