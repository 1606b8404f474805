"""Triton's kernels of a training step against PyTorch in float64: in the interpreter, and compiled on a GPU.

Those of ContMix and of large depthwise convolutions have files of their own.
"""

from __future__ import annotations

import copy
import os
from unittest.mock import Mock, patch

import pytest
import torch
from helpers import randomise, run_interpreted
from torch import Tensor
from torch.nn import functional as F

from overlock.kernels.torch import grn
from overlock.layers import DilatedRepConv
from overlock.layers import dilated_repconv as layer
from overlock.ops import backend, dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with the interpreter")
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}

# Channels beside a power of two, pieces of rows and of columns; one position.
SMALL = [(1, 3, 8, 5), (2, 16, 1, 1)]
LARGE = [(4, 64, 56, 56), (16, 256, 14, 14), (3, 70, 15, 9), (8, 512, 7, 7), (1, 64, 200, 320)]
CASES = [pytest.param(shape, torch.float32, "cpu", marks=interpreted) for shape in SMALL]
CASES += [pytest.param(SMALL[1], dtype, "cpu", marks=interpreted) for dtype in (torch.bfloat16, torch.float16)]
CASES += [pytest.param(shape, dtype, "cuda", marks=GPU) for shape in LARGE for dtype in TOLERANCE]
on_maps = pytest.mark.parametrize(("shape", "dtype", "device"), CASES)


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(__file__, "-m", "not gpu and not slow", "-k", "cpu")


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def with_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def only_triton():
    """No other backend computes what is tested here."""
    names = ("local_conv", "dilated_repconv", "sum_products", "scale_and_add")
    return patch.dict(dispatch.TABLE, {name: {"triton": dispatch.TABLE[name]["triton"]} for name in names})


def compare(operator, plain, inputs: list[Tensor]) -> None:
    """Values and gradients, in the layout of the input, twice with the same bits."""
    with backend("triton"), only_triton():
        actual, again = (with_gradients(operator, inputs) for _ in range(2))
    assert actual[0].stride() == inputs[0].stride()
    expectations = with_gradients(plain, [x.double() for x in inputs])
    for found, expected in zip(actual, expectations, strict=True):
        bound = TOLERANCE[inputs[0].dtype] * expected.abs().max().clamp(min=1e-2)
        assert (found.double() - expected).abs().max() <= bound
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def images(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return (2 * draw(shape, dtype, device)).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("gelu", [True, pytest.param(False, marks=pytest.mark.slow)])
@on_maps
def test_local_conv(shape, dtype, device, gelu):
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        a = F.gelu(x) if gelu else x
        return a + F.conv2d(a, weight, bias, padding=1, groups=x.shape[1])

    weight, bias = draw((shape[1], 1, 3, 3), dtype, device, 1), draw(shape[1:2], dtype, device, 2)
    inputs = [images(shape, dtype, device), weight, bias]
    compare(lambda *x: torch.ops.overlock.local_conv(*x, gelu), plain, inputs)


@on_maps
def test_response_norm(shape, dtype, device):
    numbers = (draw(shape[1:2], dtype, device, seed) for seed in (1, 2))
    inputs = [images(shape, dtype, device), *numbers]
    operator = torch.ops.overlock.global_response_norm
    compare(lambda *x: operator(*x, 1e-6), lambda *x: grn.twice_differentiable(*x, 1e-6), inputs)


REPCONVS = [pytest.param(shape, k, "cpu", marks=interpreted) for shape, k in [((1, 3, 2, 7), 5)]]
REPCONVS += [
    pytest.param(shape, k, "cuda", marks=GPU)
    for shape, k in [((4, 64, 56, 56), 17), ((16, 256, 14, 14), 13), ((3, 70, 15, 9), 9), ((8, 512, 7, 7), 7)]
]


@pytest.mark.parametrize(("shape", "kernel_size", "device"), REPCONVS)
def test_dilated_repconv(shape, kernel_size, device):
    """Values, all gradients and the moved statistics of the module, twice with the same bits."""
    module = randomise(DilatedRepConv(shape[1], kernel_size)).to(device).train()
    x = 3 + images(shape, torch.float32, device)

    def train(module: DilatedRepConv, x: Tensor) -> dict[str, Tensor]:
        names, parameters = zip(*module.named_parameters(), strict=True)
        x = x.detach().requires_grad_()
        y = module(x)
        grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=device).view(y.shape).to(y.dtype)
        found = torch.autograd.grad(y, [x, *parameters], grad)
        return dict(zip(["x", *names], found, strict=True)) | {"y": y.detach()} | dict(module.named_buffers())

    exact = train(copy.deepcopy(module).double(), x.double())
    taken = Mock(side_effect=layer.dilated_repconv)
    with backend("triton"), only_triton(), patch.object(layer, "dilated_repconv", taken):
        found, again = (train(copy.deepcopy(module), x) for _ in range(2))
    assert taken.call_count == 2
    for name, value in exact.items():
        assert (found[name] - value).abs().max() <= 1e-4 * value.abs().max().clamp(min=1e-2), name
        assert torch.equal(found[name], again[name]), name


@interpreted
def test_what_kernels_refuse_on_cpu():
    """Reasons in words, the same forward and backward; PyTorch's own operations run then. (``cpu``: for -k.)"""
    x, taps = torch.zeros(1, 4, 9, 9), torch.zeros(35 * 35, 4)
    numbers = torch.zeros(1, 4)
    for call in ((numbers, numbers, [35], [1], 1e-5), (numbers, [x], numbers, numbers, [35], [1], 1e-5, True, True)):
        assert "reach over 31 positions, not 35" in dispatch.why_not("dilated_repconv", "triton", x, taps, *call)
        assert dispatch.choose("dilated_repconv", "triton", x, taps, *call) == "torch"
    assert "3 x 3 taps" in dispatch.why_not("local_conv", "triton", x, torch.zeros(4, 1, 5, 5), None, False)
    assert "not float64" in dispatch.why_not("sum_products", "triton", x.double(), x.double())
    assert "nothing to compute" in dispatch.why_not("sum_products", "triton", x[:0], x[:0])


@pytest.mark.skipif(INTERPRETED, reason="Triton's kernels are taken")
@pytest.mark.parametrize(
    ("why", "taken"),
    [("bfloat16", True), ("float64", False), ("no gradient", False), ("an old GPU", False), ("torch", False)],
)
def test_where_it_trains_on_cuda(why, taken):
    """By kernels from compute capability 8.0 on, unless another backend is asked for."""
    pytest.importorskip("triton")
    x = Mock(spec=Tensor, is_cuda=True, requires_grad=why != "no gradient", device=torch.device("cuda"))
    x.dtype, x.numel = torch.float64 if why == "float64" else torch.bfloat16, lambda: 8
    capability = (7, 5) if why == "an old GPU" else (8, 0)
    with (
        patch.object(torch.cuda, "get_device_capability", lambda _: capability),
        backend("torch" if why == "torch" else "auto"),
    ):
        assert dispatch.trains_by_kernels(x) == taken
