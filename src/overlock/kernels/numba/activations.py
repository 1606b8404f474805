"""Functions of vectors that are no single instruction: powers of two, and the activations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic
from numpy.polynomial import Chebyshev, Polynomial

from overlock.kernels.numba.simd import (
    INTEGERS,
    LANES,
    VECTOR,
    absolute,
    broadcast,
    exp2_integer,
    maximum,
    minimum,
    select_negative,
    vector,
)

LOWEST = np.float32(-100)  # 2^-100 is nothing beside the largest term of a softmax, 1
SHIFT = np.float32(3 << 22)  # added to a small number, it leaves the nearest integer in the last bits


def _table(numbers: np.ndarray) -> Any:
    """32 numbers in two registers of AVX-512, of which each lane takes one."""

    @intrinsic
    def look_up(_typing_context, shifted):  # noqa: ARG001
        """The numbers at indices given as the last bits of a float32: as the index plus SHIFT."""

        def generate(_context, builder, _signature, arguments):
            name = "llvm.x86.avx512.vpermi2var.ps.512"
            kind = ir.FunctionType(VECTOR, [VECTOR, INTEGERS, VECTOR])
            known = builder.module.globals.get(name)
            low, high = (ir.Constant(VECTOR, [float(x) for x in half]) for half in numbers.reshape(2, LANES))
            function = known or ir.Function(builder.module, kind, name)
            return builder.call(function, [low, builder.bitcast(arguments[0], INTEGERS), high])

        return vector(vector), generate

    return look_up


@njit(error_model="numpy", nogil=True)
def exp2(x):
    """2^x for x <= 0 (2^-100 below -100): 2^whole from a float's bits times a polynomial, relative error 1.6e-7."""
    x = maximum(x, broadcast(LOWEST))
    shifted = x + broadcast(SHIFT)
    f = x - (shifted - broadcast(SHIFT))
    p = broadcast(np.float32(1.5353361e-4)) * f + broadcast(np.float32(1.3398875e-3))
    p = p * f + broadcast(np.float32(9.6184374e-3))
    p = p * f + broadcast(np.float32(5.5503325e-2))
    p = p * f + broadcast(np.float32(2.4022648e-1))
    p = p * f + broadcast(np.float32(6.931472e-1))
    return (p * f + broadcast(np.float32(1))) * exp2_integer(shifted)


@njit(error_model="numpy", nogil=True)
def silu(x):
    """x / (1 + e^-x)."""
    below = exp2(select_negative(x, x, broadcast(np.float32(0)) - x) * broadcast(np.float32(1.4426950408889634)))
    one = broadcast(np.float32(1))
    return x * select_negative(x, below, one) / (one + below)


@njit(error_model="numpy", nogil=True)
def normal_cdf(x):
    """1/2 (1 + erf(x / sqrt(2))), erf as a rational function with relative error 4e-7."""
    z = minimum(maximum(x * broadcast(np.float32(0.70710678)), broadcast(np.float32(-3.9))), broadcast(np.float32(3.9)))
    u = z * z
    p = broadcast(np.float32(2.06647087e-6)) * u + broadcast(np.float32(2.85063026e-4))
    p = p * u + broadcast(np.float32(3.73837491e-3))
    p = p * u + broadcast(np.float32(5.26681729e-2))
    p = p * u + broadcast(np.float32(1.89667463e-1))
    p = p * u + broadcast(np.float32(1.12837911))
    q = broadcast(np.float32(3.82700382e-5)) * u + broadcast(np.float32(1.15738343e-3))
    q = q * u + broadcast(np.float32(1.49143348e-2))
    q = q * u + broadcast(np.float32(1.13819227e-1))
    q = q * u + broadcast(np.float32(5.01421213e-1))
    q = q * u + broadcast(np.float32(1))
    half = broadcast(np.float32(0.5))
    return half + half * (z * p / q)


SEGMENT = 5.25 / 31  # of a absolute; GELU differs from max(x, 0) by less than 1e-6 beyond the last


def _gelu_segments() -> np.ndarray:
    """Coefficients (4, 32) of |x| normal_cdf(-|x|), by which GELU differs from max(x, 0), about multiples of SEGMENT.

    The first has no constant, that GELU be 0 at 0, and the last is zero.
    """

    def below(x: np.ndarray) -> np.ndarray:
        return np.array([math.erfc(number / math.sqrt(2)) / 2 for number in x])

    def fit(function: Any, degree: int, begin: float, end: float) -> np.ndarray:
        return Chebyshev.interpolate(function, degree, [begin, end]).convert(kind=Polynomial).coef

    first = [0, *fit(below, 2, 0, SEGMENT / 2)]
    others = [
        fit(lambda x, about=i * SEGMENT: (x + about) * below(x + about), 3, -SEGMENT / 2, SEGMENT / 2)
        for i in range(1, 31)
    ]
    return np.array([first, *others, [0] * 4], np.float32).T


@njit(error_model="numpy", nogil=True)
def _gelu_by_formula(x):
    return x * normal_cdf(x)


@njit(error_model="numpy", nogil=True)
def _gelu_by_table(x):
    size, half = absolute(x), broadcast(np.float32(0.5))
    short = minimum(size, broadcast(np.float32(31 * SEGMENT)))
    shifted = short * broadcast(np.float32(1 / SEGMENT)) + broadcast(SHIFT)
    f = short - (shifted - broadcast(SHIFT)) * broadcast(np.float32(SEGMENT))
    below = _cubic(shifted) * f + _square(shifted)
    below = (below * f + _linear(shifted)) * f + _constant(shifted)
    return half * x + (half * size - below)


if LANES == 16:  # 2.8 in place of 5.0 ns for a vector; absolute error 4e-7 up to 1, relative above
    _constant, _linear, _square, _cubic = map(_table, _gelu_segments())
gelu = _gelu_by_table if LANES == 16 else _gelu_by_formula


@njit(error_model="numpy", nogil=True)
def gelu_gradient(x):
    """normal_cdf(x) + x e^(-x^2 / 2) / sqrt(2 pi)."""
    density = exp2(x * x * broadcast(np.float32(-0.72134752))) * broadcast(np.float32(0.39894228))
    return normal_cdf(x) + x * density
