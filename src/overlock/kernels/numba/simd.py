"""Vectors of float32 as numba values, so that a kernel says itself what stays in registers.

A loop that a compiler may or may not turn into vector instructions is fast by luck; ``a = a + load(x, i) * w`` on
vectors is the same few instructions everywhere. LLVM splits a vector over several registers where the machine's are
shorter. Products and sums contract to fused ones.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, overload, register_model
from numpy.polynomial import Chebyshev, Polynomial

LANES = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8
VECTOR = ir.VectorType(ir.FloatType(), LANES)
INTEGERS = ir.VectorType(ir.IntType(32), LANES)
PAGE = 4096  # bytes of memory


class VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = VectorType()


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, VECTOR)


def address_of(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), VECTOR.as_pointer())


@intrinsic
def load(_typing_context, array, index):  # noqa: ARG001
    """The vector that begins at an index of a flat array."""

    def generate(context, builder, signature, arguments):
        loaded = builder.load(address_of(context, builder, signature.args[0], *arguments))
        loaded.align = 4
        return loaded

    return vector(array, types.int64), generate


@intrinsic
def store(_typing_context, array, index, value):  # noqa: ARG001
    """Write a vector to a flat array from an index on."""

    def generate(context, builder, signature, arguments):
        stored = builder.store(arguments[2], address_of(context, builder, signature.args[0], *arguments[:2]))
        stored.align = 4
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), generate


def _mask(builder: Any, lanes: Any) -> Any:
    """True in the first lanes."""
    count = _broadcast(builder, builder.trunc(lanes, ir.IntType(32)), INTEGERS)
    return builder.icmp_signed("<", ir.Constant(INTEGERS, list(range(LANES))), count)


def _broadcast(builder: Any, number: Any, kind: Any) -> Any:
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, nothing, order)


def _masked(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [x.type for x in arguments])
    name = f"llvm.masked.{name}.v{LANES}f32.p0v{LANES}f32"
    known = builder.module.globals.get(name)
    return builder.call(known or ir.Function(builder.module, kind, name), arguments)


@intrinsic
def masked_load(_typing_context, array, index, lanes):  # noqa: ARG001
    """A vector of which the first lanes are read; zeros in the others."""

    def generate(context, builder, signature, arguments):
        address = address_of(context, builder, signature.args[0], *arguments[:2])
        zeros, align = ir.Constant(VECTOR, [0.0] * LANES), ir.Constant(ir.IntType(32), 4)
        return _masked(builder, "load", VECTOR, [address, align, _mask(builder, arguments[2]), zeros])

    return vector(array, types.int64, types.int64), generate


@intrinsic
def masked_store(_typing_context, array, index, value, lanes):  # noqa: ARG001
    """Write the first lanes of a vector."""

    def generate(context, builder, signature, arguments):
        address = address_of(context, builder, signature.args[0], *arguments[:2])
        align, mask = ir.Constant(ir.IntType(32), 4), _mask(builder, arguments[3])
        _masked(builder, "store", ir.VoidType(), [arguments[2], address, align, mask])
        return context.get_dummy_value()

    return types.void(array, types.int64, vector, types.int64), generate


@intrinsic
def prefetch(_typing_context, array, index):  # noqa: ARG001
    """Begin to bring a line to the cache that is read later; it may lie beyond the array."""

    def generate(context, builder, signature, arguments):
        address = builder.bitcast(
            address_of(context, builder, signature.args[0], *arguments), ir.IntType(8).as_pointer()
        )
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        known = builder.module.globals.get("llvm.prefetch.p0i8")
        call = known or ir.Function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(call, [address, number(0), number(3), number(1)])  # to read, into the first cache, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@intrinsic
def broadcast(_typing_context, number):  # noqa: ARG001
    """One number in all lanes."""

    def generate(_context, builder, _signature, arguments):
        return _broadcast(builder, arguments[0], VECTOR)

    return vector(types.float32), generate


@intrinsic
def load_broadcast(_typing_context, array, index):  # noqa: ARG001
    """The number at an index of a flat array in all lanes; no index counts from the end, which saves the check."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return _broadcast(builder, builder.load(builder.gep(data, [arguments[1]])), VECTOR)

    return vector(array, types.int64), generate


@intrinsic
def maximum(_typing_context, value, low):  # noqa: ARG001
    """The larger of two in each lane; a NaN in the first stays."""

    def generate(_context, builder, _signature, arguments):
        value, low = arguments
        return builder.select(builder.fcmp_ordered("<", value, low), low, value)

    return vector(vector, vector), generate


@intrinsic
def minimum(_typing_context, value, high):  # noqa: ARG001
    """The smaller of two in each lane; a NaN in the first stays."""

    def generate(_context, builder, _signature, arguments):
        value, high = arguments
        return builder.select(builder.fcmp_ordered(">", value, high), high, value)

    return vector(vector, vector), generate


@intrinsic
def select_negative(_typing_context, value, then, otherwise):  # noqa: ARG001
    """A choice in each lane."""

    def generate(_context, builder, _signature, arguments):
        zeros = ir.Constant(VECTOR, [0.0] * LANES)
        return builder.select(builder.fcmp_ordered("<", arguments[0], zeros), *arguments[1:])

    return vector(vector, vector, vector), generate


@intrinsic
def exp2_integer(_typing_context, shifted):  # noqa: ARG001
    """2 to a whole number from -126 to 127, given as the last bits of a float32: as the number plus SHIFT."""

    def generate(_context, builder, _signature, arguments):
        exponent = builder.shl(builder.bitcast(arguments[0], INTEGERS), ir.Constant(INTEGERS, [23] * LANES))
        return builder.bitcast(builder.add(exponent, ir.Constant(INTEGERS, [127 << 23] * LANES)), VECTOR)

    return vector(vector), generate


@intrinsic
def absolute(_typing_context, value):  # noqa: ARG001
    def generate(_context, builder, _signature, arguments):
        name, kind = f"llvm.fabs.v{LANES}f32", ir.FunctionType(VECTOR, [VECTOR])
        known = builder.module.globals.get(name)
        return builder.call(known or ir.Function(builder.module, kind, name), arguments)

    return vector(vector), generate


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


def _arithmetic(name: str) -> Any:
    @intrinsic
    def compute(_typing_context, a, b):  # noqa: ARG001
        def generate(_context, builder, _signature, arguments):
            return getattr(builder, name)(*arguments, flags=("contract", "nsz"))

        return vector(vector, vector), generate

    return compute


def _define(symbol: Any, name: str) -> None:
    compute = _arithmetic(name)

    @overload(symbol)
    def define(a, b):
        if isinstance(a, VectorType) and isinstance(b, VectorType):

            def of_vectors(a, b):
                return compute(a, b)

            return of_vectors
        return None


for _symbol, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define(_symbol, _name)


def _across(name: str) -> Any:
    """Combine the lanes of a vector by halves."""

    @intrinsic
    def combine(_typing_context, value):  # noqa: ARG001
        def generate(_context, builder, _signature, arguments):
            value, size = arguments[0], LANES
            while size > 1:
                size //= 2
                order = ir.Constant(INTEGERS, [i + size if i < size else i for i in range(LANES)])
                other = builder.shuffle_vector(value, value, order)
                if name == "sum":
                    value = builder.fadd(value, other)
                else:
                    value = builder.select(builder.fcmp_ordered(">", value, other), value, other)
            return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

        return types.float32(vector), generate

    return combine


reduce_sum, reduce_max = _across("sum"), _across("largest")

LOWEST = np.float32(-100)  # 2^-100 is nothing beside the largest term of a softmax, 1
SHIFT = np.float32(3 << 22)  # added to a small number, it leaves the nearest integer in the last bits


@njit(error_model="numpy", nogil=True)
def aligned_empty(count):
    """Memory for numbers, from the begin of a page on.

    A vector that straddles two lines of the cache takes two reads; and with buffers at the begin of any line, four of
    nine processes took an eighth longer for the whole network than the others, against one of eight.
    """
    held = np.empty(count + PAGE // 4, np.float32)
    skipped = -held.ctypes.data % PAGE // 4
    return held[skipped : skipped + count]


@njit(error_model="numpy", nogil=True)
def aligned_zeros(count):
    """Zeros in such memory."""
    numbers = aligned_empty(count)
    numbers[:] = 0
    return numbers


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
