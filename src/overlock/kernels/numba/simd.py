"""Vectors of float32 as numba values, so that a kernel says itself what stays in registers.

Arrays hold float32, or bfloat16 as the uint16 of its bits: a load widens them, a store rounds to the nearest, ties to
even, as PyTorch does. What is computed between is float32 in either case.
A loop that a compiler may or may not turn into vector instructions is fast by luck; ``a = a + load(x, i) * w`` on
vectors is the same few instructions everywhere. LLVM splits a vector over several registers where the machine's are
shorter. Products and sums contract to fused ones.
"""

from __future__ import annotations

import operator
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, overload, register_model

_FEATURES = llvmlite.binding.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8
HAS_BFLOAT16 = LANES == 16 and bool(_FEATURES.get("avx512bf16"))  # the dot product of pairs, and the conversion
VECTOR = ir.VectorType(ir.FloatType(), LANES)
INTEGERS = ir.VectorType(ir.IntType(32), LANES)
HALVES = ir.VectorType(ir.IntType(16), LANES)
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
    """Where a vector begins: of float32, or of bfloat16 where the array has 16 bits a number."""
    data = context.make_array(kind)(context, builder, array).data
    pointee = HALVES if kind.dtype == types.uint16 else VECTOR
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())


def _of_bits(builder: Any, bits: Any, kind: Any = VECTOR) -> Any:
    """bfloat16 as float32, whose upper half it is."""
    integers = INTEGERS if kind == VECTOR else ir.IntType(32)
    by = ir.Constant(integers, [16] * LANES if kind == VECTOR else 16)
    return builder.bitcast(builder.shl(builder.zext(bits, integers), by), kind)


def to_bits(builder: Any, value: Any, kind: Any = VECTOR) -> Any:
    """float32 as bfloat16: half a unit is added to the lower half, less what an even number lacks; NaN stays one."""

    def constant(number: int) -> Any:
        return ir.Constant(INTEGERS, [number] * LANES) if kind == VECTOR else ir.Constant(ir.IntType(32), number)

    integers, halves = (INTEGERS, HALVES) if kind == VECTOR else (ir.IntType(32), ir.IntType(16))
    bits = builder.bitcast(value, integers)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
    quiet = builder.or_(bits, constant(0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, constant(16)), halves)


def read_vector(builder: Any, address: Any) -> Any:
    """The vector at an address."""
    loaded = builder.load(address)
    loaded.align = 4 if address.type.pointee == VECTOR else 2
    return loaded if address.type.pointee == VECTOR else _of_bits(builder, loaded)


def write_vector(builder: Any, value: Any, address: Any) -> None:
    """A vector to an address."""
    is_float32 = address.type.pointee == VECTOR
    builder.store(value if is_float32 else to_bits(builder, value), address).align = 4 if is_float32 else 2


def call_llvm(builder: Any, name: str, kind: Any, *values: Any) -> Any:
    """LLVM's function of a name, which gives a value of a type."""
    known = builder.module.globals.get(name)
    signature = ir.FunctionType(kind, [value.type for value in values])
    return builder.call(known or ir.Function(builder.module, signature, name), values)


@intrinsic
def load(_typing_context, array, index):  # noqa: ARG001
    """The vector that begins at an index of a flat array."""

    def generate(context, builder, signature, arguments):
        return read_vector(builder, address_of(context, builder, signature.args[0], *arguments))

    return vector(array, types.int64), generate


@intrinsic
def store(_typing_context, array, index, value):  # noqa: ARG001
    """Write a vector to a flat array from an index on."""

    def generate(context, builder, signature, arguments):
        write_vector(builder, arguments[2], address_of(context, builder, signature.args[0], *arguments[:2]))
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
    numbers = f"v{LANES}f32" if any(x.type == VECTOR.as_pointer() for x in arguments) else f"v{LANES}i16"
    name = f"llvm.masked.{name}.{numbers}.p0{numbers}"
    known = builder.module.globals.get(name)
    return builder.call(known or ir.Function(builder.module, kind, name), arguments)


def _unless_whole(builder: Any, lanes: Any, whole: Any, masked: Any) -> Any:
    """What ``masked`` generates; without AVX-512, ``whole`` where all lanes are taken.

    AVX-512 masks at no cost. A masked store of AVX is slow on AMD, and AVX has no masks for numbers of 16 bits.
    """
    if LANES == 16:
        return masked()
    takes_all = builder.icmp_signed(">=", lanes, ir.Constant(lanes.type, LANES))
    with builder.if_else(takes_all, likely=True) as (then, otherwise):
        with then:
            first, begin = whole(), builder.block
        with otherwise:
            second, end = masked(), builder.block
    if first is None:
        return None
    value = builder.phi(first.type)
    value.add_incoming(first, begin)
    value.add_incoming(second, end)
    return value


@intrinsic
def masked_load(_typing_context, array, index, lanes):  # noqa: ARG001
    """A vector of which the first lanes are read; zeros in the others."""

    def generate(context, builder, signature, arguments):
        address = address_of(context, builder, signature.args[0], *arguments[:2])
        kind, is_float32 = address.type.pointee, address.type.pointee == VECTOR
        zeros = ir.Constant(kind, [0.0 if is_float32 else 0] * LANES)
        align = ir.Constant(ir.IntType(32), 4 if is_float32 else 2)

        def masked() -> Any:
            loaded = _masked(builder, "load", kind, [address, align, _mask(builder, arguments[2]), zeros])
            return loaded if is_float32 else _of_bits(builder, loaded)

        return _unless_whole(builder, arguments[2], lambda: read_vector(builder, address), masked)

    return vector(array, types.int64, types.int64), generate


@intrinsic
def masked_store(_typing_context, array, index, value, lanes):  # noqa: ARG001
    """Write the first lanes of a vector."""

    def generate(context, builder, signature, arguments):
        address = address_of(context, builder, signature.args[0], *arguments[:2])
        is_float32 = address.type.pointee == VECTOR
        align = ir.Constant(ir.IntType(32), 4 if is_float32 else 2)

        def masked() -> None:
            value = arguments[2] if is_float32 else to_bits(builder, arguments[2])
            _masked(builder, "store", ir.VoidType(), [value, address, align, _mask(builder, arguments[3])])

        _unless_whole(builder, arguments[3], lambda: write_vector(builder, arguments[2], address), masked)
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
        return _broadcast(builder, _read_number(context, builder, signature.args[0], *arguments), VECTOR)

    return vector(array, types.int64), generate


def _read_number(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    number = builder.load(builder.gep(context.make_array(kind)(context, builder, array).data, [index]))
    return _of_bits(builder, number, ir.FloatType()) if kind.dtype == types.uint16 else number


@intrinsic
def load_number(_typing_context, array, index):  # noqa: ARG001
    """The number at an index of a flat array."""

    def generate(context, builder, signature, arguments):
        return _read_number(context, builder, signature.args[0], *arguments)

    return types.float32(array, types.int64), generate


@intrinsic
def store_number(_typing_context, array, index, value):  # noqa: ARG001
    """Write a number to a flat array."""

    def generate(context, builder, signature, arguments):
        array, index, value = arguments
        address = builder.gep(context.make_array(signature.args[0])(context, builder, array).data, [index])
        is_half = signature.args[0].dtype == types.uint16
        builder.store(to_bits(builder, value, ir.FloatType()) if is_half else value, address)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.float32), generate


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
