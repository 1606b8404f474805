"""The microkernel of a matrix product as a numba value: a tile of the result that stays in registers.

MR, NR and KC are those of BLIS: MR x NR numbers of the result are as many vectors as there are registers, less those
for the operands, and KC steps of the depth are packed at one place. Each step reads NR weights and one number of each
row, so a tile's arithmetic covers its reads from the second-level cache. Packed rows are ROW_STRIDE numbers apart, so
that all of them are reached from one address.

Numbers are float32, or in their places pairs of bfloat16, two steps of the depth in one: then products are summed in
float32 by the dot product of pairs (AVX-512 BF16). Elsewhere it is two multiply-adds, of the same values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from overlock.kernels.numba.pairs import add_pairs, round_to_bfloat16
from overlock.kernels.numba.simd import (
    HALVES,
    LANES,
    _broadcast,
    address_of,
    call_llvm,
    vector,
    write_vector,
)

MR = 12 if LANES == 16 else 6
NR = 2 * LANES
KC = 256  # of rows at one place
ROW_STRIDE = KC + LANES  # no power of two, or rows would share lines of the cache
INDEX = ir.IntType(64)


def is_of_pairs(weight: Any) -> bool:
    """Whether the type of a weight's address tells that it holds pairs: then it is unsigned, as those of such maps."""
    return bool(weight == types.uint64)


@intrinsic
def numbers_of(_typing_context, weight):
    """How many numbers one place holds, by the type of the weight's address: a constant."""
    count = 2 if is_of_pairs(weight) else 1
    return types.int64(weight), lambda *_: INDEX(count)


def packed_numbers(memory, weight):
    """The float32 numbers of some memory, or the bits of bfloat16, to be packed beside a weight of that type."""
    raise NotImplementedError("for code that numba compiles")


@overload(packed_numbers, inline="always")
def _packed_numbers(memory, weight):  # noqa: ARG001
    if is_of_pairs(weight):
        return lambda memory, weight: memory.view(np.uint16)  # noqa: ARG005
    return lambda memory, weight: memory  # noqa: ARG005


@intrinsic
def store_packed(_typing_context, array, index, value):  # noqa: ARG001
    """As ``store``; see ``round_to_bfloat16``."""

    def generate(context, builder, signature, arguments):
        address = address_of(context, builder, signature.args[0], *arguments[:2])
        if address.type.pointee == HALVES:
            builder.store(round_to_bfloat16(builder, arguments[2]), address).align = 2
        else:
            write_vector(builder, arguments[2], address)
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), generate


class _Builder:
    """What the loops need of LLVM, beside an ``IRBuilder``, for vectors of some lanes."""

    def __init__(self, builder: Any, arguments: Any, lanes: int, of_pairs: bool):
        self.builder, self.lanes, self.kind = builder, lanes, ir.VectorType(ir.FloatType(), lanes)
        self.multiply_add = self.add_pairs if of_pairs else self.fma
        x, weight, self.depth, start, self.start_step, out, self.out_step, self.ahead, self.ahead_step = arguments
        self.x, self.weight, self.start, self.out = (
            builder.inttoptr(address, self.kind.as_pointer()) for address in (x, weight, start, out)
        )

    def fma(self, a: Any, b: Any, sums: Any) -> Any:
        """sums + a * b, each."""
        return self.call(f"llvm.fma.v{self.lanes}f32", a, b, sums)

    def add_pairs(self, a: Any, b: Any, sums: Any) -> Any:
        """sums + the dot products of pairs of bfloat16, the bits of a's and b's numbers."""
        return add_pairs(self.builder, sums, a, b)

    def call(self, name: str, *values: Any) -> Any:
        """LLVM's function of a name."""
        return call_llvm(self.builder, name, self.kind, *values)

    def at(self, address: Any, offset: Any) -> Any:
        """The address ``offset`` numbers on."""
        offset = INDEX(offset) if isinstance(offset, int) else offset
        numbers = self.builder.bitcast(address, ir.FloatType().as_pointer())
        return self.builder.bitcast(self.builder.gep(numbers, [offset]), self.kind.as_pointer())

    def load(self, address: Any, offset: Any) -> Any:
        loaded = self.builder.load(self.at(address, offset))
        loaded.align = 4
        return loaded

    def store(self, value: Any, address: Any, offset: Any) -> None:
        self.builder.store(value, self.at(address, offset)).align = 4

    def row(self, r: int, step: Any, v: int) -> Any:
        """Numbers from an address to a vector of a row of those ``step`` apart."""
        return self.builder.add(self.builder.mul(step, INDEX(r)), INDEX(v * self.lanes))

    def broadcast(self, address: Any, offset: Any) -> Any:
        """The number at an address, in all lanes."""
        number = self.builder.bitcast(self.at(address, offset), ir.FloatType().as_pointer())
        return _broadcast(self.builder, self.builder.load(number), self.kind)

    def prefetch(self, address: Any) -> None:
        """Begin to bring a line to the second cache."""
        address = self.builder.inttoptr(address, ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        known = self.builder.module.globals.get("llvm.prefetch.p0i8")
        call = known or ir.Function(self.builder.module, kind, "llvm.prefetch.p0i8")
        self.builder.call(call, [address, number(0), number(2), number(1)])

    def accumulate(self, rows: int, vectors: int, end: Any) -> Any:
        """A loop over the depth for a count of rows; returns the block that begins it."""
        builder, places = self.builder, [(r, v) for r in range(rows) for v in range(vectors)]
        begin, loop, done = (builder.append_basic_block(name) for name in ("begin", "loop", "done"))
        builder.position_at_end(begin)
        sums = [self.load(self.start, self.row(r, self.start_step, v)) for r, v in places]
        builder.branch(loop)

        builder.position_at_end(loop)
        step, held = builder.phi(INDEX), [builder.phi(self.kind) for _ in places]
        weights = self.at(self.weight, builder.mul(step, INDEX(NR)))
        columns = [self.load(weights, v * self.lanes) for v in range(vectors)]
        x = self.at(self.x, step)
        added = []
        for r in range(rows):
            number = self.broadcast(x, r * ROW_STRIDE)
            for v in range(vectors):
                added.append(self.multiply_add(number, columns[v], held[r * vectors + v]))
        self.prefetch(builder.add(self.ahead, builder.mul(step, self.ahead_step)))
        following = builder.add(step, INDEX(1))
        for phi, first, last in zip([step, *held], [INDEX(0), *sums], [following, *added], strict=True):
            phi.add_incoming(first, begin)
            phi.add_incoming(last, loop)
        builder.cbranch(builder.icmp_signed("<", following, self.depth), loop, done)

        builder.position_at_end(done)
        for (r, v), result in zip(places, added, strict=True):
            self.store(result, self.out, self.row(r, self.out_step, v))
        builder.branch(end)
        return begin


def _microkernel(rows: int, vectors: int, lanes: int) -> Any:
    """Of up to ``rows`` rows and the first columns of a panel, by vectors of some lanes."""

    @intrinsic
    def multiply(_typing_context, of, count, x, weight, depth, start, start_step, out, out_step, ahead, ahead_step):  # noqa: ARG001
        def generate(context, builder, _signature, arguments):
            loops = _Builder(builder, arguments[2:], lanes, is_of_pairs(of))
            end = builder.append_basic_block("end")
            choice = builder.switch(arguments[1], end)
            for case in range(1, rows + 1):
                choice.add_case(INDEX(case), loops.accumulate(case, vectors, end))
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(of, *[types.int64] * 10), generate

    return multiply


# out (rows, NR) = start (rows, NR) + x (rows, depth) @ weight (depth, NR), each at an address; x's rows are
# ROW_STRIDE apart, those of start and out as many numbers as is said, 1 <= rows <= MR and depth >= 1. The first
# argument tells by its type alone what x and weight hold: see is_of_pairs. The others do the first columns alone: three
# halves of a vector, for as many rows as there are registers, a whole one, and a half.
HALF_VECTOR, HALF_MR = LANES // 2, MR // 2
multiply_two_vectors, multiply_three_halves = _microkernel(MR, 2, LANES), _microkernel(HALF_MR, 3, HALF_VECTOR)
multiply_vector, multiply_half = _microkernel(MR, 1, LANES), _microkernel(MR, 1, HALF_VECTOR)
