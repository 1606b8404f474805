"""The microkernel of a matrix product as a numba value: a tile of the result that stays in registers.

MR, NR and KC are those of BLIS: MR x NR numbers of the result are as many vectors as there are registers, less those
for the operands, and KC steps of the depth are packed at one place. Each step reads NR weights and one number of each
row, so a tile's arithmetic covers its reads from the second-level cache. Packed rows are ROW_STRIDE numbers apart, so
that all of them are reached from one address.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from overlock.kernels.numba.simd import LANES, _broadcast

MR = 12 if LANES == 16 else 6
NR = 2 * LANES
KC = 256  # of rows at one place
ROW_STRIDE = KC + LANES  # no power of two, or rows would share lines of the cache
INDEX = ir.IntType(64)


class _Builder:
    """What the loops need of LLVM, beside an ``IRBuilder``, for vectors of some lanes."""

    def __init__(self, builder: Any, arguments: Any, lanes: int):
        self.builder, self.lanes, self.kind = builder, lanes, ir.VectorType(ir.FloatType(), lanes)
        _, x, weight, self.depth, start, self.start_step, out, self.out_step, self.ahead, self.ahead_step = arguments
        self.x, self.weight, self.start, self.out = (
            builder.inttoptr(address, self.kind.as_pointer()) for address in (x, weight, start, out)
        )
        kind = ir.FunctionType(self.kind, [self.kind] * 3)
        name = f"llvm.fma.v{lanes}f32"
        self.fma = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)

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
                added.append(builder.call(self.fma, [number, columns[v], held[r * vectors + v]]))
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
    def multiply(_typing_context, count, x, weight, depth, start, start_step, out, out_step, ahead, ahead_step):  # noqa: ARG001
        def generate(context, builder, _signature, arguments):
            loops, end = _Builder(builder, arguments, lanes), builder.append_basic_block("end")
            choice = builder.switch(arguments[0], end)
            for case in range(1, rows + 1):
                choice.add_case(INDEX(case), loops.accumulate(case, vectors, end))
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return multiply


# out (rows, NR) = start (rows, NR) + x (rows, depth) @ weight (depth, NR), each at an address; x's rows are
# ROW_STRIDE apart, those of start and out as many numbers as is said, 1 <= rows <= MR and depth >= 1. The others do the
# first columns alone: three halves of a vector, for as many rows as there are registers, a whole one, and a half.
HALF_VECTOR, HALF_MR = LANES // 2, MR // 2
multiply_two_vectors, multiply_three_halves = _microkernel(MR, 2, LANES), _microkernel(HALF_MR, 3, HALF_VECTOR)
multiply_vector, multiply_half = _microkernel(MR, 1, LANES), _microkernel(MR, 1, HALF_VECTOR)
