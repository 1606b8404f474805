"""Vectors of float32 in numba: memory, arithmetic, what goes across lanes, and the functions made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numba import njit

from overlock.kernels.numba import activations
from overlock.kernels.numba import simd as v

LANES = v.LANES


def numbers(seed=0):
    return np.random.default_rng(seed).standard_normal(LANES).astype(np.float32)


def apply(function, values):
    """A function of vectors over a flat array."""

    @njit
    def each(x, out):
        for i in range(0, x.size, LANES):
            v.store(out, i, function(v.load(x, i)))

    padded = np.zeros(-(-values.size // LANES) * LANES, np.float32)
    padded[: values.size] = values
    out = np.empty_like(padded)
    each(padded, out)
    return torch.from_numpy(out[: values.size].copy())


@pytest.mark.parametrize("lanes", range(LANES + 1))
def test_parts(lanes):
    """Only the first lanes are read and written."""

    @njit
    def copy(x, out, lanes):
        v.store(out, 0, v.masked_load(x, 1, lanes))
        v.masked_store(out, LANES + 1, v.load(x, 1), lanes)

    x, out = np.arange(1, LANES + 2, dtype=np.float32), np.full(2 * LANES + 1, -1, np.float32)
    copy(x, out, lanes)
    assert (out[:LANES] == np.where(np.arange(LANES) < lanes, x[1:], 0)).all()
    assert (out[LANES + 1 :] == np.where(np.arange(LANES) < lanes, x[1:], -1)).all()


def test_bfloat16():
    """Widened as it is read, and rounded as PyTorch does as it is written: ties, denormal numbers, NaN and infinity."""
    x = torch.cat([
        torch.randn(4 * LANES, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-40, 38, 4 * LANES),
        torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, -3.4e38, 1e-41, 0.0, -0.0]),
        torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 1 + 2**-9, 2.0**-133, 65280.0, 65281.0]),
    ])  # fmt: skip
    x = x[: x.numel() // LANES * LANES]

    @njit
    def copy(x, whole, parts, single, back):
        for i in range(0, x.size, LANES):
            v.store(whole, i, v.load(x, i))
            v.masked_store(parts, i, v.load(x, i), 3)
            for j in range(i, i + LANES):
                v.store_number(single, j, x[j])
            v.store(back, i, v.masked_load(whole, i, LANES - 1))
            back[i + LANES - 1] = v.load_number(whole, i + LANES - 1)

    whole, parts, single = (np.full(x.numel(), 7, np.uint16) for _ in range(3))
    back = np.empty(x.numel(), np.float32)
    copy(x.numpy(), whole, parts, single, back)
    expected = x.bfloat16()
    for bits in (whole, single):
        torch.testing.assert_close(
            torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), expected, rtol=0, atol=0, equal_nan=True
        )
    torch.testing.assert_close(torch.from_numpy(back), expected.float(), rtol=0, atol=0, equal_nan=True)
    first = np.arange(x.numel()) % LANES < 3
    assert (parts == np.where(first, whole, 7)).all()


@pytest.mark.parametrize("lanes", [-LANES, -1])
def test_no_lanes_below_zero(lanes):
    """Nothing is read, as where taps end before a pair of vectors does."""

    @njit
    def read(x, out, lanes):
        v.store(out, 0, v.masked_load(x, 0, lanes))

    out = np.ones(LANES, np.float32)
    read(numbers(), out, lanes)
    assert not out.any()


def test_arithmetic():
    @njit
    def compute(a, b, out):
        x, y = v.load(a, 0), v.load(b, 0)
        v.store(out, 0, (x + y) * x / (y - x))

    a, b, out = numbers(1), numbers(2), np.empty(LANES, np.float32)
    compute(a, b, out)
    np.testing.assert_allclose(out, (a + b) * a / (b - a), rtol=1e-5)


def test_across_lanes():
    @njit
    def both(x):
        return v.reduce_sum(v.load(x, 0)), v.reduce_max(v.load(x, 0))

    x = numbers()
    total, reduce_max = both(x)
    assert math.isclose(total, x.astype(np.float64).sum(), rel_tol=1e-5)
    assert reduce_max == x.max()


def test_limits_keep_nan():
    """maximum and minimum pass on a NaN in their first."""

    @njit
    def limit(x, low, high):
        v.store(low, 0, v.maximum(v.load(x, 0), v.broadcast(np.float32(0))))
        v.store(high, 0, v.minimum(v.load(x, 0), v.broadcast(np.float32(0))))

    x, low, high = numbers(), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    x[1] = np.nan
    limit(x, low, high)
    np.testing.assert_array_equal(low, np.maximum(x, 0))
    np.testing.assert_array_equal(high, np.minimum(x, 0))


def test_gelu_of_zero():
    """Nothing stays nothing, and its neighbours keep their sign."""
    actual = apply(activations.gelu, np.array([0, 1e-30, -1e-30, 1e-4], np.float32))
    assert actual[0] == 0
    torch.testing.assert_close(actual, torch.nn.functional.gelu(torch.tensor([0, 1e-30, -1e-30, 1e-4])))


def test_exp2():
    """To a relative 2e-7 down to 2^-99; what lies below -100 is 2^-100; a NaN stays."""
    x = torch.linspace(-99, 0, 100_003)
    actual = apply(activations.exp2, x.numpy()).double()
    assert float((actual / x.double().exp2() - 1).abs().max()) < 2e-7
    edge = apply(activations.exp2, np.array([0, -100, -200, -np.inf, np.nan], np.float32))
    assert edge[:4].tolist() == [1, 2**-100, 2**-100, 2**-100]
    assert edge[4].isnan()


@pytest.mark.parametrize("name", ["silu", "gelu", "_gelu_by_formula"])
def test_activations(name):
    """Against PyTorch's in float64, to 5e-7 of the reduce_max number or to 5e-7 of the input."""
    function = torch.nn.functional.silu if name == "silu" else torch.nn.functional.gelu
    for limit in (1, 10, 1e4, 1e30):
        x = torch.linspace(-limit, limit, 100_003)
        error = (apply(getattr(activations, name), x.numpy()).double() - function(x.double())).abs()
        assert float((error / x.double().abs().clamp_min(1)).max()) < 5e-7


@pytest.mark.parametrize("name", ["silu", "gelu", "_gelu_by_formula"])
def test_activations_of_what_is_not_finite(name):
    """As PyTorch's: infinity stays, NaN stays, and so at least does not become a number."""
    x = torch.tensor([math.inf, math.nan, -math.inf])
    actual = apply(getattr(activations, name), x.numpy())
    assert actual[0] == math.inf
    assert actual[1].isnan()
    assert not actual[2].isfinite()
