"""The fused first half of a ConvFFN against its layers: widths that fill no panel, splits, bands that wrap the ring."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from overlock.kernels.numba.expand_filter import expand_and_filter
from overlock.kernels.numba.flags import SCALE
from overlock.kernels.numba.gemm import pack_panels
from overlock.kernels.numba.gemm_microkernel import NR
from overlock.kernels.numba.runtime import run


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("splits", "band"), [(1, 1), (2, 3), (3, 9)])
@pytest.mark.parametrize("channels", [4, NR // 2, NR, NR + 3, 2 * NR + NR // 2 + 1])
def test_equals_its_layers(channels, splits, band, dtype):
    """Results and sums of their squares; nothing is left unwritten."""
    batch, height, width, depth = 2, 10, 7, 5
    generator = torch.Generator().manual_seed(channels)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, scale, weight, bias = (
        draw(batch, height, width, depth),
        draw(batch, depth),
        draw(channels, depth),
        draw(channels),
    )
    taps, offset = draw(3, 3, channels), draw(channels)
    out = torch.full((batch, height, width, channels), torch.nan)
    sums = torch.full((batch, splits, channels), torch.nan)
    run(
        expand_and_filter, batch * splits, x=x, scale=scale, weight=pack_panels(weight, bias, dtype),
        filter_weight=taps.flatten(0, 1), filter_bias=offset, out=out, sums=sums, height=height, width=width,
        depth=depth, channels=channels, prologue=SCALE, splits=splits, band=band,
    )  # fmt: skip
    taken, weight = ((x * scale[:, None, None]).to(dtype).double(), weight.to(dtype).double())
    hidden = F.gelu(F.linear(taken, weight, bias.double())).permute(0, 3, 1, 2)
    filters = taps.double().permute(2, 0, 1)[:, None]
    expected = F.conv2d(hidden, filters, offset.double(), padding=1, groups=channels)
    torch.testing.assert_close(out.permute(0, 3, 1, 2).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.sum(1).double(), expected.square().sum((2, 3)), rtol=1e-5, atol=1e-5)
