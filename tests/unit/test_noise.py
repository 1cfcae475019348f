"""Counter-based noise: the published Philox vectors, independence, moments, speed."""

import time

import numpy as np
import pytest
import torch

from streamgen.noise import cell_noise, philox

VECTORS = [  # Random123, kat_vectors: philox4x32 10
    ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_known_vectors(counter, key, words):
    counters = np.array([counter] * 3, dtype=np.uint64).T
    got = philox(key, counters)
    assert got.shape == (3, 4) and got.dtype == np.uint32
    assert [f"{word:08x}" for word in got[1]] == words.split()


def test_a_cell_depends_on_itself_only():
    cells = [(s, b, i) for s in (0, 1, 2**63) for b in (0, 1, 10**6) for i in (0, 3)]
    forth = {cell: cell_noise(*cell, (3, 5, 7)) for cell in cells}
    back = {cell: cell_noise(*cell, (3, 5, 7)) for cell in reversed(cells)}
    assert all(torch.equal(forth[cell], back[cell]) for cell in cells)
    flat = torch.stack([forth[cell].flatten() for cell in cells])
    assert len(flat.flatten().unique()) == flat.numel()
    # A longer draw begins with a shorter one: an element's number is its index.
    assert torch.equal(cell_noise(0, 0, 0, (1000,))[:105], forth[0, 0, 0].flatten())


def test_golden_values():
    """Pins the mapping from words to normals; a change would change every seed's video."""
    words = philox(0, np.zeros((4, 1), dtype=np.uint64))[0]
    uniform = [(w if w < 2**31 else 2**32 - 1 - w) * 4.6566127342e-10 for w in map(int, words)]
    radius = [(-2 * np.log(u)) ** 0.5 for u in uniform[::2]]
    angle = [2 * np.pi * u for u in uniform[1::2]]
    wanted = [f(a) * r for r, a in zip(radius, angle, strict=True) for f in (np.cos, np.sin)]
    assert cell_noise(0, 0, 0, (4,)).tolist() == pytest.approx(wanted, abs=1e-6)


def test_moments():
    x = torch.stack([cell_noise(11, block, step, (50_000,)) for block in range(5) for step in range(4)]).double()
    n = x.numel()
    assert x.mean().abs() < 4 / n**0.5
    assert (x.var() - 1).abs() < 4 * (2 / n) ** 0.5
    assert (x**3).mean().abs() < 4 * (15 / n) ** 0.5
    assert ((x**4).mean() - 3).abs() < 4 * (96 / n) ** 0.5
    assert (x[:, 1:] * x[:, :-1]).mean().abs() < 4 / n**0.5
    assert (x @ x.T / x.shape[1] - torch.eye(20)).abs().max() < 5 * (2 / x.shape[1]) ** 0.5
    quantiles = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    below = torch.stack([(x < q).double().mean() for q in quantiles])
    torch.testing.assert_close(below, torch.special.ndtr(quantiles).double(), atol=2e-3, rtol=0)


def test_shape_dtype_and_limits():
    assert cell_noise(1, 2, 3, (1, 3, 5), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert cell_noise(1, 2, 3, (0,)).shape == (0,)
    for bad in ((-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 0, 2**32)):
        with pytest.raises(ValueError, match="must be 0 to"):
            cell_noise(*bad, (4,))


def test_speed():
    def once():
        start = time.perf_counter()
        cell_noise(1, 2, 3, (10_000,))
        return time.perf_counter() - start

    assert min(once() for _ in range(50)) < 1e-3
