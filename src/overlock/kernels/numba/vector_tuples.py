"""Several vectors as one numba value, a tuple that LLVM keeps in registers; code is generated for its count."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from overlock.kernels.numba.pairs import add_pairs
from overlock.kernels.numba.simd import address_of, read_vector, vector, write_vector

FUSED = ("contract", "nsz")  # a product and a sum may be one operation


def _addresses(context: Any, builder: Any, kind: Any, arguments: Any, count: int) -> list[Any]:
    """Where ``count`` vectors of an array begin, given the array, the index of the first one, and the step."""
    array, first, step = arguments
    indices = (builder.add(first, builder.mul(step, ir.Constant(ir.IntType(64), i))) for i in range(count))
    return [address_of(context, builder, kind, array, index) for index in indices]


@intrinsic(prefer_literal=True)
def repeat(_typing_context, value, count):  # noqa: ARG001
    """A vector ``count`` times, a constant."""
    kind = types.UniTuple(vector, count.literal_value)

    def generate(context, builder, _signature, arguments):
        return context.make_tuple(builder, kind, [arguments[0]] * kind.count)

    return kind(vector, count), generate


@intrinsic(prefer_literal=True)
def load_all(_typing_context, array, first, step, count):  # noqa: ARG001
    """``count`` vectors, a constant, of a flat array: the first begins at an index, the others ``step`` numbers on."""
    kind = types.UniTuple(vector, count.literal_value)

    def generate(context, builder, signature, arguments):
        addresses = _addresses(context, builder, signature.args[0], arguments[:3], kind.count)
        return context.make_tuple(builder, kind, [read_vector(builder, address) for address in addresses])

    return kind(array, types.int64, types.int64, count), generate


@intrinsic
def multiply_add(_typing_context, sums, factor, values):  # noqa: ARG001
    """Sums + factor * values, each."""

    def generate(context, builder, _signature, arguments):
        pairs = zip(*(cgutils.unpack_tuple(builder, arguments[i], sums.count) for i in (0, 2)), strict=True)
        added = [builder.fadd(a, builder.fmul(arguments[1], b, flags=FUSED), flags=FUSED) for a, b in pairs]
        return context.make_tuple(builder, sums, added)

    return sums(sums, vector, values), generate


@intrinsic
def add_dot_products(_typing_context, sums, factor, values):  # noqa: ARG001
    """As multiply_add, of pairs of bfloat16."""

    def generate(context, builder, _signature, arguments):
        pairs = zip(*(cgutils.unpack_tuple(builder, arguments[i], sums.count) for i in (0, 2)), strict=True)
        return context.make_tuple(builder, sums, [add_pairs(builder, a, arguments[1], b) for a, b in pairs])

    return sums(sums, vector, values), generate


@intrinsic
def store_all(_typing_context, array, first, step, values):  # noqa: ARG001
    """Write vectors to a flat array from an index on, each ``step`` numbers after the one before."""

    def generate(context, builder, signature, arguments):
        addresses = _addresses(context, builder, signature.args[0], arguments[:3], values.count)
        for value, address in zip(cgutils.unpack_tuple(builder, arguments[3], values.count), addresses, strict=True):
            write_vector(builder, value, address)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, values), generate


@intrinsic
def add_all(_typing_context, array, first, step, values):  # noqa: ARG001
    """Add vectors to those of a flat array."""

    def generate(context, builder, signature, arguments):
        addresses = _addresses(context, builder, signature.args[0], arguments[:3], values.count)
        for value, address in zip(cgutils.unpack_tuple(builder, arguments[3], values.count), addresses, strict=True):
            write_vector(builder, builder.fadd(read_vector(builder, address), value, flags=FUSED), address)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, values), generate
