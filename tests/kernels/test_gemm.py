"""Products of tokens and weights in numba: every cut of rows, depths and columns, and the steps around them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from overlock.fused.layer_plans import Convolution, Epilogue, Pointwise, Prologue, Size
from overlock.kernels.numba.flags import SILU
from overlock.kernels.numba.gemm_microkernel import KC, MR, NR
from overlock.kernels.numba.plan import Plan, input_buffer

DEPTHS = (1, 7, KC - 1, KC, KC + 1, 2 * KC, 2 * KC + 1, 3 * KC + 5)
WIDTHS = (1, NR // 2, NR // 2 + 1, NR, NR + 1, 3 * NR + 9)


types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def multiply(product, rows, x, out, others=(), **options):
    plan = Plan()
    given = {name: input_buffer(2 + i) if isinstance(i, int) else i for name, i in options.items()}
    product.add(plan, rows, input_buffer(0), input_buffer(1), **given)
    plan.finish().run(x, out, *others)


def rounded(x, dtype):
    """What a product in a type takes of x, exactly."""
    return x.to(dtype).double()


def check(actual, expected):
    assert float((actual.double() - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@types
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [*range(1, MR + 2), 40, 313])
def test_shapes(rows, threads, dtype):
    """Nothing is written beyond the result."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for i, depth in enumerate(DEPTHS):
            width = WIDTHS[(i + rows) % len(WIDTHS)]
            x, weight, bias = draw(rows, depth), draw(width, depth, seed=1), draw(width, seed=2)
            out = torch.full((rows + 1, width), 7.0)
            multiply(Pointwise(weight, bias, dtype), rows, x, out)
            check(out[:rows], F.linear(rounded(x, dtype), rounded(weight, dtype), bias.double()))
            assert (out[rows] == 7).all()
    finally:
        torch.set_num_threads(before)


@types
def test_steps(dtype):
    """Scales of two images, gate, residual and its scale, activations; x with a stride."""
    rows, tokens, depth, width = 26, 13, 37, 41
    weight, bias, residual_scale = draw(width, depth, seed=1), draw(width, seed=2), draw(width, seed=3)
    wide, scale, gate, residual = (
        draw(rows, 50),
        draw(2, depth, seed=4),
        draw(rows, depth, seed=5),
        draw(rows, width, seed=6),
    )
    x, out, product = wide[:, :depth], torch.empty(rows, width), Pointwise(weight, bias, dtype)
    plan = Plan()
    product.add(
        plan, rows, input_buffer(0), input_buffer(1), x_stride=50,
        prologue=Prologue(input_buffer(2), tokens, gate=input_buffer(3)),
        epilogue=Epilogue(residual=input_buffer(4), residual_scale=residual_scale),
    )  # fmt: skip
    plan.finish().run(wide, out, scale, gate, residual)
    scaled = rounded(x * scale.repeat_interleave(tokens, 0) * gate, dtype)
    product_of = F.linear(scaled, rounded(weight, dtype), bias.double())
    check(out, product_of + residual_scale.double() * residual.double())
    plan = Plan()
    product.add(plan, rows, input_buffer(0), input_buffer(1), x_stride=50, epilogue=Epilogue(SILU))
    plan.finish().run(wide, out)
    check(out, F.silu(F.linear(rounded(x, dtype), rounded(weight, dtype), bias.double())))


@types
@pytest.mark.parametrize(
    ("channels", "width", "kernel_size", "stride", "height"),
    [(1, 1, 3, 1, 1), (3, 28, 3, 2, 30), (5, 7, 3, 1, 9), (28, 33, 5, 2, 20), (85, 20, 3, 1, 7), (112, 70, 3, 2, 14),
     (257, 40, 3, 3, 9), (520, 7, 3, 1, 6)],
)  # fmt: skip
def test_convolutions(channels, width, kernel_size, stride, height, dtype):
    """Windows of rows, of taps and of parts of taps; of an odd number too."""
    x = draw(2, height, height + 1, channels)
    weight, bias = draw(width, channels, kernel_size, kernel_size, seed=1), draw(width, seed=2)
    product, size, plan = Convolution(weight, bias, stride, dtype), Size(2, height, height + 1), Plan()
    out = torch.full((product.shrunk(size).rows, width), torch.nan)
    product.add(plan, size, input_buffer(0), input_buffer(1))
    plan.finish().run(x, out)
    maps = rounded(x, dtype).permute(0, 3, 1, 2)
    expected = F.conv2d(maps, rounded(weight, dtype), bias.double(), stride, kernel_size // 2)
    check(out, expected.permute(0, 2, 3, 1).reshape(out.shape))


def test_bfloat16_halves_weights():
    weight, bias = draw(3 * NR, 2 * KC), draw(3 * NR)
    whole, half = Pointwise(weight, bias).panels, Pointwise(weight, bias, torch.bfloat16).panels
    assert half.nbytes == 4 * 3 * NR * (KC + 1)
    assert whole.nbytes == 4 * 3 * NR * (2 * KC + 1)


@types
def test_not_a_number(dtype):
    """It comes out as one, in its row alone."""
    x, weight, out = draw(3, 9), draw(5, 9, seed=1), torch.empty(3, 5)
    x[1, 4] = torch.nan
    multiply(Pointwise(weight, draw(5), dtype), 3, x, out)
    assert out[1].isnan().all()
    assert out[::2].isfinite().all()
