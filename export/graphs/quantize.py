"""Quantises the matrices of a part with ONNX Runtime's quantizer.

Each block of 32 weights has a scale and a zero point. Activations stay fp32;
where the processor multiplies eight-bit numbers faster, the kernel quantises
them block by block. Tables that are looked up, norms, biases and the routers of experts,
where a small error chooses other experts, keep their type.
"""

import logging
from pathlib import Path

import onnx

BLOCK = 32
INT8 = 4  # the quantizer's accuracy level for products of eight-bit activations


def version() -> str:
    """The quantizer's version."""
    import onnxruntime

    return str(onnxruntime.__version__)


def quantize(source: Path, target: Path, data: Path, bits: int) -> None:
    """Quantise the matrices of the graph at `source` to `bits` bits (8 or 4).

    Writes the graph to `target` and its tensors of more than 1 kB to `data`.
    Raises ImportError where ONNX Runtime's quantizer is not installed, OSError
    as the disk does.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    model = onnx.load(str(source))
    routers = [node.name for node in model.graph.node if node.input[1:] == ["router.weight"]]
    quantizer = MatMulNBitsQuantizer(
        model, bits=bits, block_size=BLOCK, is_symmetric=False, accuracy_level=INT8, nodes_to_exclude=routers
    )
    quantizer.process()
    data.unlink(missing_ok=True)  # onnx would append to it
    onnx.save(
        quantizer.model.model, str(target), save_as_external_data=True, all_tensors_to_one_file=True,
        location=data.name, size_threshold=1024,
    )  # fmt: skip
    data.chmod(target.stat().st_mode)  # onnx lets only the owner read it
