"""Pairs of bfloat16 in the places of float32 numbers, whose dot products AVX-512 BF16 adds to sums in float32."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from overlock.kernels.numba.simd import (
    HALVES,
    HAS_BFLOAT16,
    INTEGERS,
    LANES,
    VECTOR,
    call_llvm,
    to_bits,
    vector,
)


def add_pairs(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """Sums + the dot products of pairs of bfloat16, which are the bits of a's and b's numbers (AVX-512 BF16).

    Elsewhere by two multiply-adds, of the same values.
    """
    kind = sums.type
    integers = ir.VectorType(ir.IntType(32), kind.count)
    a, b = (builder.bitcast(x, integers) for x in (a, b))
    if HAS_BFLOAT16:
        return call_llvm(builder, f"llvm.x86.avx512bf16.dpbf16ps.{32 * kind.count}", kind, sums, a, b)
    upper, by = (ir.Constant(integers, [number] * kind.count) for number in (0xFFFF0000, 16))
    for part in (lambda pairs: builder.and_(pairs, upper), lambda pairs: builder.shl(pairs, by)):
        factors = (builder.bitcast(part(x), kind) for x in (a, b))
        sums = call_llvm(builder, f"llvm.fma.v{kind.count}f32", kind, *factors, sums)
    return sums


def round_to_bfloat16(builder: Any, value: Any) -> Any:
    """The bits, by the instruction where there is one; it takes the smallest numbers for 0."""
    if HAS_BFLOAT16:
        return call_llvm(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", HALVES, value)
    return to_bits(builder, value)


@intrinsic
def pair_of(_typing_context, first, second):  # noqa: ARG001
    """Two vectors in the place of one, their numbers as pairs of bfloat16."""

    def generate(_context, builder, _signature, arguments):
        lower, upper = (builder.zext(round_to_bfloat16(builder, x), INTEGERS) for x in arguments)
        return builder.bitcast(builder.or_(lower, builder.shl(upper, ir.Constant(INTEGERS, [16] * LANES))), VECTOR)

    return vector(vector, vector), generate


@intrinsic
def first_of(_typing_context, pairs):  # noqa: ARG001
    """The first number of each pair."""

    def generate(_context, builder, _signature, arguments):
        bits = builder.bitcast(arguments[0], INTEGERS)
        return builder.bitcast(builder.shl(bits, ir.Constant(INTEGERS, [16] * LANES)), VECTOR)

    return vector(vector), generate
