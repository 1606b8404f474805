"""Products of tokens and weights in numba: every cut of rows, depths and columns, and the steps around them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from overlock.fused.layer_plans import Epilogue, Pointwise, Prologue
from overlock.kernels.numba.flags import SILU
from overlock.kernels.numba.gemm_microkernel import KC, MR, NR
from overlock.kernels.numba.plan import Plan, input_buffer

DEPTHS = (1, 7, KC - 1, KC, KC + 1, 3 * KC + 5)
WIDTHS = (1, NR // 2, NR // 2 + 1, NR, NR + 1, 3 * NR + 9)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def multiply(product, rows, x, out, others=(), **options):
    plan = Plan()
    given = {name: input_buffer(2 + i) if isinstance(i, int) else i for name, i in options.items()}
    product.add(plan, rows, input_buffer(0), input_buffer(1), **given)
    plan.finish().run(x, out, *others)


def check(actual, expected):
    assert float((actual.double() - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [*range(1, MR + 2), 40, 313])
def test_shapes(rows, threads):
    """Nothing is written beyond the result."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for i, depth in enumerate(DEPTHS):
            width = WIDTHS[(i + rows) % len(WIDTHS)]
            x, weight, bias = draw(rows, depth), draw(width, depth, seed=1), draw(width, seed=2)
            out = torch.full((rows + 1, width), 7.0)
            multiply(Pointwise(weight, bias), rows, x, out)
            check(out[:rows], F.linear(x.double(), weight.double(), bias.double()))
            assert (out[rows] == 7).all()
    finally:
        torch.set_num_threads(before)


def test_steps():
    """Scales of two images, gate, residual and its scale, activations; x with a stride."""
    rows, tokens, depth, width = 26, 13, 37, 41
    weight, bias, residual_scale = draw(width, depth, seed=1), draw(width, seed=2), draw(width, seed=3)
    wide, scale, gate, residual = (
        draw(rows, 50),
        draw(2, depth, seed=4),
        draw(rows, depth, seed=5),
        draw(rows, width, seed=6),
    )
    x, out, product = wide[:, :depth], torch.empty(rows, width), Pointwise(weight, bias)
    plan = Plan()
    product.add(
        plan, rows, input_buffer(0), input_buffer(1), x_stride=50,
        prologue=Prologue(input_buffer(2), tokens, gate=input_buffer(3)),
        epilogue=Epilogue(residual=input_buffer(4), residual_scale=residual_scale),
    )  # fmt: skip
    plan.finish().run(wide, out, scale, gate, residual)
    scaled = x.double() * scale.double().repeat_interleave(tokens, 0) * gate.double()
    check(out, F.linear(scaled, weight.double(), bias.double()) + residual_scale.double() * residual.double())
    plan = Plan()
    product.add(plan, rows, input_buffer(0), input_buffer(1), x_stride=50, epilogue=Epilogue(SILU))
    plan.finish().run(wide, out)
    check(out, F.silu(F.linear(x.double(), weight.double(), bias.double())))
