"""The parts in PyTorch against their definitions, written out anew."""

import math

import pytest
import torch

from engines.eager.layers import attention_rows, drift, probe, rms_norm, rotary_tables, rotate

B, T, S, H, G, D = 1, 3, 7, 4, 2, 8


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_rms_norm(rng: torch.Generator) -> None:
    x, weight = torch.randn(2, 5, 16, generator=rng), torch.randn(16, generator=rng)
    wanted = torch.nn.functional.rms_norm(x, (16,), weight, 1e-5)
    print((rms_norm(x, weight, 1e-5) - wanted).abs().max())
    assert torch.allclose(rms_norm(x, weight, 1e-5), wanted, atol=1e-6)


def test_rotary_keeps_distances(rng: torch.Generator) -> None:
    """q · k depends on the difference of positions alone, and position 0 changes nothing."""
    cos, sin = rotary_tables(20, D, 1e4)
    q, k = torch.randn(2, 1, 1, 1, D, generator=rng)

    def score(p: int, r: int) -> float:
        turned = [rotate(x, cos[None, at : at + 1], sin[None, at : at + 1]) for x, at in ((q, p), (k, r))]
        return float((turned[0] * turned[1]).sum())

    assert math.isclose(score(3, 5), score(13, 15), abs_tol=1e-4) and abs(score(3, 5) - score(3, 6)) > 1e-3
    assert torch.equal(rotate(q, cos[None, :1], sin[None, :1]), q)


def test_attention_rows_of_grouped_heads(rng: torch.Generator) -> None:
    q, k = torch.randn(B, T, H, D, generator=rng), torch.randn(B, G, S, D, generator=rng)
    mask = torch.tensor([[True] * 5 + [False] * 2])
    found = attention_rows(q, k, mask)
    for head in range(H):
        for row in range(T):
            scores = [float(q[0, row, head] @ k[0, head * G // H, s]) / math.sqrt(D) for s in range(5)]
            wanted = torch.tensor([*scores, -math.inf, -math.inf]).softmax(0)
            assert torch.allclose(found[0, head, row], wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ["row", "head"])
def test_drift(kind: str, rng: torch.Generator) -> None:
    """1 where nothing changed, less where the counted rows did; the other rows and masked keys do not matter."""
    q, k = torch.randn(B, T, H, D, generator=rng), torch.randn(B, G, S, D, generator=rng)
    counted = torch.tensor([[True, True, False]])
    mask = torch.tensor([[True] * 5 + [False] * 2])
    other, changed = q.clone(), q.clone()
    other[:, 2] += 1
    changed[:, 0] += 1
    keys = k.clone()
    keys[:, :, 6] += 1

    def sigma(now: torch.Tensor, after: torch.Tensor) -> float:
        return float(drift(kind, q, now, counted, k[:, :, :4].clone(), after, mask))

    assert math.isclose(sigma(q, k), 1, abs_tol=1e-6)
    assert math.isclose(sigma(other, keys), 1, abs_tol=1e-6)
    assert sigma(changed, k) < 0.999


def test_probe_takes_the_most_attended(rng: torch.Generator) -> None:
    q, k = torch.randn(B, T, H, D, generator=rng), torch.randn(B, G, S, D, generator=rng)
    counted, mask = torch.tensor([[True, True, False]]), torch.ones(B, S, dtype=torch.bool)
    eligible = torch.tensor([[False, True, True, True, True, True, True]])
    mass = attention_rows(q, k, mask)[0, :, :2].sum((0, 1))
    wanted = sorted(range(1, S), key=lambda slot: -float(mass[slot]))[:3]
    assert probe(3, q, counted, k, mask, eligible)[0].tolist() == wanted
