"""The large-kernel depthwise convolution against PyTorch's in float64.

On the CPU the kernels run in Triton's interpreter, in a process of its own: this file as a script (see
test_backends.py). With a GPU (-m gpu) they run compiled.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1e-2}


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    size: int
    layout: str = "contiguous"
    bias: bool = True


SMALL = {
    "the kernel's size": Case((1, 3, 7, 7), 7),
    "smaller than the kernel": Case((2, 4, 4, 6), 9, "channels last"),
    "one row": Case((1, 2, 1, 20), 7),
    "more than a block of channels": Case((1, 40, 4, 4), 7, "channels last", bias=False),
    "more than a tile": Case((2, 3, 10, 9), 7, "half of channels last"),
    "largest kernel": Case((1, 2, 2, 3), 31),
}
LARGE = {
    "stage 3 at 224": Case((16, 640, 14, 14), 13, "channels last"),
    "stage 1 at 224": Case((4, 64, 56, 56), 17, "channels last"),
    "detection": Case((1, 128, 100, 160), 15),
    "wide": Case((2, 33, 40, 70), 31),
}
HALF = ("the kernel's size", "more than a block of channels")
GRID = [(name, "float32") for name in SMALL]
GRID += [(name, dtype) for dtype in ("bfloat16", "float16") for name in HALF]


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    batch, channels, height, width = case.shape
    x = draw(*case.shape)
    if case.layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    if case.layout == "half of channels last":
        x = draw(batch, height, width, 2 * channels).permute(0, 3, 1, 2)[:, channels:]
    return x, draw(channels, 1, case.size, case.size) / case.size, draw(channels) if case.bias else None


def outcome(name: str, dtype: str, device: str = "cpu") -> dict[str, float]:
    """Largest differences from float64 relative to the largest entry, of the kernels themselves."""
    from overlock.ops import triton_depthwise as depthwise

    x, weight, bias = make_inputs((SMALL | LARGE)[name], getattr(torch, dtype), device)
    assert depthwise.why_not(x, weight) is None
    output = depthwise.convolve(x, weight, bias)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    found = [output, depthwise.input_gradient(grad, x, weight), depthwise.weight_gradient(grad, x, weight)]

    exact = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.conv2d(*exact, padding=weight.shape[-1] // 2, groups=x.shape[1])
    gradients = torch.autograd.grad(expected, exact[:2], grad.double())
    pairs = zip(("output", "x", "weight"), found, (expected.detach(), *gradients), strict=True)
    errors = {key: float((a - b).abs().max() / b.abs().max()) for key, a, b in pairs}
    if name == "the kernel's size" or device == "cuda":
        again = [depthwise.convolve(x, weight, bias), depthwise.weight_gradient(grad, x, weight)]
        errors["repeat"] = float(not (torch.equal(found[0], again[0]) and torch.equal(found[2], again[1])))
    return errors


@functools.cache
def interpreted() -> subprocess.CompletedProcess:
    """Outcomes of the whole grid in Triton's interpreter, as this file prints them."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", __file__], env=environment, capture_output=True, text=True, check=False
    )


def check(errors: dict[str, float], dtype: str) -> None:
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize(("name", "dtype"), GRID)
def test_values_and_gradients_in_the_interpreter(name, dtype):
    process = interpreted()
    assert process.returncode == 0, process.stderr
    check(json.loads(process.stdout)[f"{name}, {dtype}"], dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SMALL | LARGE)
def test_values_and_gradients_on_a_gpu(name, dtype):
    check(outcome(name, dtype, "cuda"), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("part", ["forward", "input", "weight"])
def test_the_choice_is_timed_once(part, monkeypatch):
    """One measurement of both a shape; the answer is the shorter time's."""
    from overlock.ops import triton_depthwise as depthwise

    times = []
    monkeypatch.setattr(depthwise, "_faster", {})
    monkeypatch.setattr(depthwise, "_milliseconds", lambda run: (run(), times.append(2.0 - len(times)), times[-1])[-1])
    x, weight, _ = make_inputs(SMALL["the kernel's size"], torch.float32, "cuda")
    assert not depthwise.choose(x, weight, part)
    assert not depthwise.choose(x, weight, part)
    assert times == [2.0, 1.0]


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "half of channels last"])
@pytest.mark.parametrize("bias", [True, False])
def test_operator_is_one_node_and_equals_the_convolution(layout, bias):
    """Without a GPU the operator takes PyTorch's convolution: same values and gradients, one node in a graph."""
    from overlock.ops.triton_depthwise import depthwise_conv2d

    case = Case((2, 6, 8, 9), 7, layout, bias)
    inputs = [None if t is None else t.requires_grad_() for t in make_inputs(case, torch.float32, "cpu")]
    tensors = [t for t in inputs if t is not None]
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    output = torch.compile(depthwise_conv2d, backend=keep, fullgraph=True)(*inputs)
    expected = F.conv2d(*inputs, padding=3, groups=6)
    torch.testing.assert_close(output, expected)
    assert output.stride() == torch.empty_like(inputs[0]).stride()
    assert sum("overlock" in str(node.target) for node in graphs[0].graph.nodes) == 1
    for found, wanted in zip(
        torch.autograd.grad(output.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(torch.ops.overlock.depthwise_conv2d, tuple(inputs))


def test_autocast_and_gradients_not_asked_for():
    from overlock.ops.triton_depthwise import depthwise_conv2d

    x, weight, bias = make_inputs(SMALL["the kernel's size"], torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        output = depthwise_conv2d(x, weight.requires_grad_(), bias)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert x.grad is None


def test_why_not():
    from overlock.ops.triton_depthwise import choose, why_not

    x, weight = torch.zeros(1, 4, 9, 9), torch.zeros(4, 1, 7, 7)
    assert "CUDA device" in why_not(x, weight)
    assert not choose(x, weight)


def main() -> None:
    """Print the outcomes of the grid. Unwritten memory holds NaN, so that it shows."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    print(json.dumps({f"{name}, {dtype}": outcome(name, dtype) for name, dtype in GRID}))  # noqa: T201


if __name__ == "__main__":
    main()
