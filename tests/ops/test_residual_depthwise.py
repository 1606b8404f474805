"""The residual depthwise convolution, with and without GELU, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.layers import LocalConv
from overlock.ops import backend, local_conv

SHAPES = [(2, 20, 5, 3), (1, 16, 1, 1), (3, 7, 1, 30), (2, 33, 12, 11)]
OPERATOR = torch.ops.overlock.local_conv.default


def make_inputs(shape: tuple[int, ...], layout: torch.memory_format = torch.channels_last) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(shape, generator=generator).contiguous(memory_format=layout)
    weight, bias = torch.randn(shape[1], 1, 3, 3, generator=generator), torch.randn(shape[1], generator=generator)
    return [t.requires_grad_() for t in (x, weight, bias)]


def plain(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    a = F.gelu(x) if gelu else x
    return a + F.conv2d(a, weight, bias, padding=1, groups=x.shape[1])


def with_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    output = function(*inputs)
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, cotangent)]


@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, layout, gelu, choice):
    """In float32, in the layout of the input, with the same bits again."""
    inputs = make_inputs(shape, layout)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with backend(choice):
        actual, again = (with_gradients(lambda *x: local_conv(*x, gelu), inputs) for _ in range(2))
    assert actual[0].stride() == torch.empty_like(inputs[0]).stride()
    for found, expected in zip(actual, with_gradients(lambda *x: plain(*x, gelu), exact), strict=True):
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max().clamp(min=1)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def test_large_values():
    """GELU and its derivative far from zero: no overflow, and NaN stays NaN."""
    x, weight, bias = make_inputs((1, 16, 4, 4))
    with torch.no_grad():
        x[0, 0], x[0, 1], x[0, 2, 0, 0] = 1e4, -1e4, torch.nan
    value, of_x, *_ = with_gradients(lambda *inputs: local_conv(*inputs, True), [x, weight, bias])
    expected, expected_of_x, *_ = with_gradients(lambda *inputs: plain(*inputs, True), [x, weight, bias])
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-2, equal_nan=True)
    torch.testing.assert_close(of_x, expected_of_x, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("gelu", [False, True])
def test_operator(gelu):
    """One node in the graph of a training step, and what PyTorch asks of an operator."""
    pytest.importorskip("numba")
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    inputs = make_inputs(SHAPES[0])
    torch.compile(LocalConv(20, gelu=gelu), backend=keep, fullgraph=True)(inputs[0])
    assert [str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"] == ["overlock.local_conv"]
    torch.library.opcheck(OPERATOR, (*inputs, gelu))


def test_autocast():
    """As the layers that it stands for."""
    inputs = make_inputs(SHAPES[0])
    with torch.autocast("cpu", torch.bfloat16):
        output = OPERATOR(*inputs, True)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), plain(*inputs, True), rtol=3e-2, atol=3e-2)
    output.float().sum().backward()
    assert inputs[1].grad.dtype == torch.float32


@pytest.mark.parametrize("in_dims", [(0, None, None), (2, None, None), (None, 0, 0)])
def test_vmap(in_dims):
    """Over images and over weights, as of PyTorch's operations."""
    inputs = [
        x.detach() if dim is None else torch.stack([x, -x, x + 1], dim).detach()
        for x, dim in zip(make_inputs(SHAPES[0]), in_dims, strict=True)
    ]
    actual, expected = (
        torch.func.vmap(lambda *x, call=call: call(*x, True), in_dims)(*inputs) for call in (OPERATOR, plain)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("why", ["float64", "no gradient", "scripted"])
def test_plain_operations_elsewhere(why):
    """Other types, inference and scripts have PyTorch's operations."""
    x, module = make_inputs(SHAPES[0])[0], LocalConv(20, gelu=True)
    if why == "float64":
        x, module = x.double(), module.double()
    with torch.set_grad_enabled(why != "no gradient"):
        y = (torch.jit.script(module) if why == "scripted" else module)(x)
    assert y.grad_fn is None or "overlock_local_conv" not in y.grad_fn.name()
