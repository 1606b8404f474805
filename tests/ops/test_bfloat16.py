"""Convolutions and response norm in bfloat16 on CPU, by kernels that sum in float32, against float64."""

from __future__ import annotations

import pytest
import torch

from overlock.ops import backend, depthwise_conv2d, local_conv, response_norm

pytest.importorskip("numba")
ROUNDING = 2**-8  # of a number of eight bits, in one step


def filtered(x, weight, bias):
    return depthwise_conv2d(x, weight, bias)


def dilated(x, weight, bias):
    return depthwise_conv2d(x, weight, bias, 2)


def local(x, weight, bias):
    return local_conv(x, weight, bias, gelu=True)


def normed(x, weight, bias):
    return response_norm(x, weight[:, 0, 0, 0], bias, 1e-6)


def with_gradients(function, inputs):
    result = function(*inputs)
    cotangents = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view(result.shape).to(result.dtype)
    return [result, *torch.autograd.grad(result, inputs, cotangents)]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("function", [filtered, dilated, local, normed])
@pytest.mark.parametrize("scale", [1, 300])
def test_against_float64(function, layout, scale):
    """Parameters in float32, as autocast meets them; images in bfloat16, also large ones."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 20, 9, 11), (20, 1, 5, 5), (20,)))
    x = (x * scale).bfloat16().to(memory_format=layout)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(function, inputs)
    with backend("reference"):
        expected = with_gradients(function, exact)
    assert found[0].dtype == torch.bfloat16
    assert "overlock" in str(found[0].grad_fn)
    for actual, wanted, like in zip(found, expected, [x, *inputs], strict=True):
        assert actual.dtype == like.dtype
        assert float((actual - wanted).abs().max()) <= 2 * ROUNDING * float(wanted.abs().max())


def test_layout_of_the_result():
    x = torch.randn(2, 20, 9, 11).to(memory_format=torch.channels_last).bfloat16().requires_grad_()
    weight, bias = torch.randn(20, 1, 5, 5).bfloat16().requires_grad_(), torch.zeros(20).bfloat16().requires_grad_()
    found = with_gradients(filtered, [x, weight, bias])
    assert [t.dtype for t in found] == [torch.bfloat16] * 4
    assert found[0].stride() == found[1].stride() == x.stride()
    assert found[2].stride() == weight.stride()
