"""The response norm against the oracle in float64, by the kernels and by PyTorch's operations."""

from __future__ import annotations

import pytest
import torch
from oracle import response_norm as oracle_norm
from torch import Tensor

from overlock.layers import GlobalResponseNorm
from overlock.ops import backend, response_norm

SHAPES = [(2, 20, 5, 3), (1, 16, 1, 1), (3, 7, 1, 130), (2, 33, 12, 11)]
OPERATOR = torch.ops.overlock.global_response_norm.default


def make_inputs(shape: tuple[int, ...], layout: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "every second column":
        x = x.repeat_interleave(2, dim=3)[:, :, :, ::2]
    weight, bias = torch.randn(2, shape[1], generator=generator)
    return [t.requires_grad_() for t in (x, weight, bias)]


def with_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    output = function(*inputs)
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, cotangent)]


@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every second column"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, layout, choice):
    """In float32, in the layout of the input, with the same bits again."""
    inputs = make_inputs(shape, layout)
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def exactly(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return oracle_norm({"n.gamma": weight.view(1, -1, 1, 1), "n.beta": bias.view(1, -1, 1, 1)}, "n", x)

    with backend(choice):
        actual, again = (with_gradients(lambda *x: response_norm(*x, 1e-6), inputs) for _ in range(2))
    assert actual[0].stride() == torch.empty_like(inputs[0]).stride()
    for found, expected in zip(actual, with_gradients(exactly, exact), strict=True):
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max().clamp(min=1)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def test_channel_of_zeros():
    """Has a norm of zero and finite gradients."""
    inputs = make_inputs(SHAPES[0], "channels last")
    with torch.no_grad():
        inputs[0][:, 3] = 0
    assert all(x.isfinite().all() for x in with_gradients(lambda *x: response_norm(*x, 1e-6), inputs))


def test_operator():
    """One node in the graph of a training step, and what PyTorch asks of an operator."""
    pytest.importorskip("numba")
    module, graphs = GlobalResponseNorm(6), []
    x = torch.randn(2, 6, 8, 9).contiguous(memory_format=torch.channels_last)

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(module, backend=keep, fullgraph=True)(x)
    assert [str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"] == [
        "overlock.global_response_norm"
    ]
    torch.library.opcheck(OPERATOR, (*make_inputs(SHAPES[0], "channels last"), 1e-6))


@pytest.mark.parametrize("in_dims", [(0, None, None), (2, None, None), (None, 0, 0)])
def test_vmap(in_dims):
    """Over images and over weights, values and gradients, as in turn."""
    inputs = [x.detach() for x in make_inputs(SHAPES[0], "contiguous")]
    inputs = [
        x.requires_grad_() if dim is None else torch.stack([x, -x, x + 1], dim).requires_grad_()
        for x, dim in zip(inputs, in_dims, strict=True)
    ]

    def in_turn(*tensors: Tensor) -> Tensor:
        each = [
            response_norm(
                *(x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims, strict=True)), 1e-6
            )
            for i in range(3)
        ]
        return torch.stack(each)

    mapped = torch.func.vmap(lambda *x: OPERATOR(*x, 1e-6), in_dims)
    for found, expected in zip(with_gradients(mapped, inputs), with_gradients(in_turn, inputs), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("why", ["float64", "no gradient", "scripted"])
def test_plain_operations_elsewhere(why):
    """Other types, inference and scripts have PyTorch's operations."""
    x, weight, bias = make_inputs(SHAPES[0], "contiguous")
    if why == "float64":
        x, weight, bias = x.double(), weight.double(), bias.double()
    module = GlobalResponseNorm(20)
    with torch.set_grad_enabled(why != "no gradient"):
        y = torch.jit.script(module)(x) if why == "scripted" else response_norm(x, weight, bias, 1e-6)
    assert y.grad_fn is None or "global_response_norm" not in y.grad_fn.name()
