"""What the compiler's log says of the demo's shape: kernels, copies and scratch do not creep back."""

from dataclasses import replace

import pytest

from export.checkpoint.families.llada import FAMILY
from scripts.experiments.make_random_checkpoint import COMMON, SHAPES
from scripts.kernels import Profile, figures, read_log, step_seconds

LOG = """\
Max Scratch Memory: 4096 bytes
Name: __myl_TranCast_myl0_0, LayerType: kgen, Inputs: [ { Name: k, Dimensions: [2,8] }], Constants: [], Outputs: \
[ { Name: a, Dimensions: [2,8], Strides: [8,1], Datatype: Half, Format: x }], TacticName: t, StreamId: 0, Metadata:
Name: matmul_1_myl0_1, LayerType: gemm, Inputs: [ ], Constants: [], Outputs: \
[ { Name: b, Dimensions: [4], Strides: [1], Datatype: Float, Format: x }], TacticName: t, StreamId: 1, Metadata:
Name: __mye1_myl0_2, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata:
"""


def test_the_log_is_read() -> None:
    """A copy is a kernel that only moves numbers; calls on the host are none."""
    (row,) = read_log("layer", 64, LOG.splitlines(), 10)
    assert (row.kernels, row.products, row.copies, row.copied, row.streams, row.scratch) == (2, 1, 1, 32, 2, 4096)


@pytest.mark.slow
def test_the_demo_shape() -> None:
    package = pytest.importorskip("engines.trt.package", reason="the package itself")
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx, which builds without a GPU, is not installed")
    config = replace(FAMILY.read_config(COMMON | SHAPES["demo"]), max_length=1024)
    profiles = figures(config, 16, "fp16", "8.9", package.find("tensorrt_rtx"))
    reuse: dict[str, Profile] = {row.part: row for row in profiles if row.profile == 0}
    keys = reuse["layer"].slots * config.kv_heads * config.head_size * 2  # bytes of K or V of a layer
    assert reuse["layer"].kernels <= 15 and reuse["tests_row"].kernels <= 11 and reuse["tests_head"].kernels <= 15
    assert all(row.streams == 1 for row in profiles)
    assert reuse["layer"].copied < 2.5 * keys, "K and V once, for the attention kernel"
    assert reuse["tests_row"].copied < keys, "no copy of K"
    assert all(row.scratch < 2 * reuse[row.part].scratch for row in profiles if row.part.startswith("tests"))
    assert max(row.scratch for row in profiles) < 12e6
    step = step_seconds(config, profiles, "H100 SXM")
    assert step["step"] == pytest.approx(sum(value for name, value in step.items() if name != "step"))
