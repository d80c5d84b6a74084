"""Permutations of rows, half-precision numbers and input embeddings."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.gpu.buffers import InputEmbeddings, cycles, narrow, widen
from tests.support.fake_gpu import FakeCuda


@given(st.permutations(range(9)))
def test_cycles_carry_out_a_permutation(source: list[int]) -> None:
    rows = np.arange(9) * 10
    expected = rows[source]
    for cycle in cycles(np.arange(9), np.array(source)):
        spare = rows[cycle[0]]
        for to, where in pairwise(cycle):
            rows[to] = rows[where]
        rows[cycle[-1]] = spare
    assert (rows == expected).all()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_halves_there_and_back(precision: str) -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    half = torch.from_numpy(values).to(torch.float16 if precision == "fp16" else torch.bfloat16)
    raw = narrow(values, precision)
    assert raw.tobytes() == half.view(torch.int16).numpy().tobytes()
    assert np.array_equal(widen(raw.view(np.uint8), precision), half.float().numpy())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_input_embeddings_replace_chosen_rows(precision: str) -> None:
    cuda, width = FakeCuda(), 8 * (4 if precision == "fp32" else 2)
    embeddings = np.arange(32, dtype=np.float32).reshape(4, 8)  # exact in every precision
    hidden = cuda.alloc(6 * width, "hidden states")
    rows = InputEmbeddings(cuda, embeddings, precision)
    rows.copy_to(hidden, np.array([-5, 1, 2, -1, 0, 0]))
    raw = np.empty((6, width), np.uint8)
    cuda.download(raw, hidden)
    cuda.sync()
    expected = np.zeros((6, 8), np.float32)
    expected[[1, 2, 4, 5]] = embeddings[[1, 2, 0, 0]]
    assert np.array_equal(widen(raw, precision), expected)
    rows.free()
    assert cuda.owned == [hidden]
