"""Products of tokens and weights in numba: every cut of rows, depths and columns, and the steps around them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from overlock.fused.kernel_plans import Product
from overlock.kernels.numba.gemm import SILU
from overlock.kernels.numba.gemm_microkernel import DEPTH, PANEL, ROWS
from overlock.kernels.numba.plan import Program, input_place

DEPTHS = (1, 7, DEPTH - 1, DEPTH, DEPTH + 1, 3 * DEPTH + 5)
WIDTHS = (1, PANEL // 2, PANEL // 2 + 1, PANEL, PANEL + 1, 3 * PANEL + 9)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def multiply(product, rows, x, out, others=(), **options):
    program = Program()
    given = {name: input_place(2 + i) if isinstance(i, int) else i for name, i in options.items()}
    product.add(program, rows, input_place(0), input_place(1), **given)
    program.compile().run(x, out, *others)


def check(actual, expected):
    assert float((actual.double() - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [*range(1, ROWS + 2), 40, 313])
def test_shapes(rows, threads):
    """Nothing is written beyond the result."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for i, depth in enumerate(DEPTHS):
            width = WIDTHS[(i + rows) % len(WIDTHS)]
            x, weight, bias = draw(rows, depth), draw(width, depth, seed=1), draw(width, seed=2)
            out = torch.full((rows + 1, width), 7.0)
            multiply(Product(weight, bias), rows, x, out)
            check(out[:rows], F.linear(x.double(), weight.double(), bias.double()))
            assert (out[rows] == 7).all()
    finally:
        torch.set_num_threads(before)


def test_steps():
    """Scales of two images, gate, other and share, activations; x with a stride."""
    rows, tokens, depth, width = 26, 13, 37, 41
    weight, bias, share = draw(width, depth, seed=1), draw(width, seed=2), draw(width, seed=3)
    wide, scale, gate, other = (
        draw(rows, 50),
        draw(2, depth, seed=4),
        draw(rows, depth, seed=5),
        draw(rows, width, seed=6),
    )
    x, out, product = wide[:, :depth], torch.empty(rows, width), Product(weight, bias)
    program = Program()
    product.add(
        program, rows, input_place(0), input_place(1), stride=50, scale=input_place(2), tokens=tokens,
        gate=input_place(3), other=input_place(4), share=share,
    )  # fmt: skip
    program.compile().run(wide, out, scale, gate, other)
    scaled = x.double() * scale.double().repeat_interleave(tokens, 0) * gate.double()
    check(out, F.linear(scaled, weight.double(), bias.double()) + share.double() * other.double())
    program = Program()
    product.add(program, rows, input_place(0), input_place(1), stride=50, after=SILU)
    program.compile().run(wide, out)
    check(out, F.silu(F.linear(x.double(), weight.double(), bias.double())))
