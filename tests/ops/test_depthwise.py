"""The large depthwise convolution against PyTorch's in float64, and the layer that takes it.

Triton's kernels run in its interpreter as in test_backends.py; there the operator takes them, elsewhere on CPU
PyTorch's convolution. With a GPU (-m gpu) they run compiled.
"""

from __future__ import annotations

import os
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from helpers import images, randomise, run_interpreted
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from overlock import fuse
from overlock.layers import ConvNorm, DilatedRepConv
from overlock.layers.dilated_repconv import branches_of
from overlock.ops import backend, depthwise, depthwise_conv2d, dispatch

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1e-2}
PARTS = (depthwise.FORWARD, depthwise.INPUT_GRADIENT, depthwise.WEIGHT_GRADIENT)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def operator(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    return torch.ops.overlock.depthwise_conv2d(x, weight, bias, dilation)


gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    size: int
    layout: str = "contiguous"
    bias: bool = True
    dilation: int = 1


SMALL = {
    "the kernel's size": Case((1, 3, 7, 7), 7),
    "smaller than the kernel": Case((2, 4, 4, 6), 9, "channels last"),
    "one row": Case((1, 2, 1, 20), 7),
    "more than a block of channels": Case((1, 20, 4, 4), 7, "channels last", bias=False),
    "more than a tile": Case((2, 3, 10, 9), 7, "half of channels last"),
    "images in a tile": Case((5, 8, 7, 7), 7, "channels last"),
    "wide loads and bands": Case((2, 8, 20, 19), 17, "channels last"),
    "largest kernel": Case((1, 2, 2, 3), 31),
    "with gaps": Case((2, 8, 9, 10), 3, "channels last", dilation=5),
    "wide with gaps": Case((2, 8, 9, 10), 5, dilation=2),
    "nine taps": Case((2, 70, 6, 7), 3, "half of channels last", bias=False),
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
ON_GPU = [pytest.param(*case, marks=gpu) for case in [*GRID, *((name, dtype) for name in LARGE for dtype in TOLERANCE)]]


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    batch, channels, height, width = case.shape
    x = draw(*case.shape)
    if case.layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    if case.layout == "half of channels last":
        x = draw(batch, height, width, 2 * channels).permute(0, 3, 1, 2)[:, channels:]
    return [x, draw(channels, 1, case.size, case.size) / case.size, draw(channels) if case.bias else None]


def with_gradients(function, inputs: list[Tensor | None], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Output, and gradients of what needs one; the cotangent is rounded to a type."""
    output = function(*inputs)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(output)
    tensors = [x for x in inputs if x is not None and x.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, tensors, cotangent)]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    reach = weight.shape[3] // 2 * dilation
    return F.conv2d(x, weight, bias, padding=reach, dilation=dilation, groups=x.shape[1])


# ---- Triton's kernels -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_kernels_in_the_interpreter():
    """The tests of this file that are for it."""
    pytest.importorskip("triton")
    run_interpreted(__file__, "-m", "not gpu", "-k", "triton")


@pytest.fixture
def triton_only(request, monkeypatch):
    """PyTorch's convolution fails, and memory that was not written holds NaN (a GPU would be asked for more)."""
    on_gpu = request.node.get_closest_marker("gpu") is not None
    if not (INTERPRETED or on_gpu):
        pytest.skip("runs in the process with the interpreter")
    for part in PARTS:
        monkeypatch.setitem(dispatch.TABLE, part, {"triton": dispatch.TABLE[part]["triton"]})
    torch.use_deterministic_algorithms(not on_gpu)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "dtype"), GRID + ON_GPU)
def test_triton_values_and_gradients(name, dtype, triton_only, request):
    """Every kind of map, in the layout of the input, twice with the same bits."""
    device, dtype = "cuda" if request.node.get_closest_marker("gpu") else "cpu", getattr(torch, dtype)
    inputs = [x if x is None else x.requires_grad_() for x in make_inputs((SMALL | LARGE)[name], dtype, device)]
    exact = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
    dilation = (SMALL | LARGE)[name].dilation
    actual = with_gradients(lambda *x: operator(*x, dilation), inputs)
    assert actual[0].stride() == torch.empty_like(inputs[0]).stride()
    expectations = with_gradients(lambda *x: convolve(*x, dilation), exact, dtype)
    for found, expected in zip(actual, expectations, strict=True):
        assert (found - expected).abs().max() <= TOLERANCE[str(dtype).removeprefix("torch.")] * expected.abs().max()
    if name in HALF:
        assert all(torch.equal(a, b) for a, b in zip(actual, with_gradients(operator, inputs), strict=True))


@pytest.mark.parametrize("programs", [1, 7])
def test_triton_weight_gradient_in_few_programs(programs, triton_only, monkeypatch):
    """Each walks over many places and images, as on a GPU, where maps are large; the sums are those of any number."""
    from overlock.kernels.triton import depthwise as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    x, weight, _ = make_inputs(Case((5, 8, 10, 19), 9, "channels last"))
    grad = images(5, 8, 10, 19)
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=4, groups=8)
    found = kernels.weight_gradient(grad, x, weight)
    assert (found - expected).abs().max() <= TOLERANCE["float32"] * expected.abs().max()


@pytest.mark.parametrize("training", [True, False])
def test_triton_in_the_layer(training, triton_only):
    """A Dilated RepConv whose large convolution is Triton's: the same values and gradients."""
    module = randomise(DilatedRepConv(3, 7)).train(training)
    x = images(2, 3, 5, 6).requires_grad_()
    tensors = [x, *module.parameters()]
    with patch("overlock.layers.depthwise_conv.depthwise_conv2d", convolve):
        expected = [(y := module(x)).detach(), *torch.autograd.grad(y.square().sum(), tensors)]

    def large_by_triton(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        return (operator if weight.shape[3] == 7 else convolve)(x, weight, bias, dilation)

    with patch("overlock.layers.depthwise_conv.depthwise_conv2d", large_by_triton):
        actual = [(y := module(x)).detach(), *torch.autograd.grad(y.square().sum(), tensors)]
    for found, wanted in zip(actual, expected, strict=True):
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-5


def test_triton_why_not(triton_only):
    """Reasons in words."""
    weight = torch.zeros(4, 1, 7, 7)
    for words, x, w in (
        ("not float64", torch.zeros(1, 4, 9, 9, dtype=torch.float64), weight),
        ("K odd and dilated 3 to 31", torch.zeros(1, 4, 9, 9), torch.zeros(4, 1, 8, 8)),
        ("one dtype", torch.zeros(1, 4, 9, 9), weight.bfloat16()),
        ("nothing to compute", torch.zeros(0, 4, 9, 9), weight),
    ):
        assert words in dispatch.why_not("depthwise_conv2d", "triton", x, w, None, 1)
    x = torch.zeros(1, 4, 9, 9)
    assert "dilated 3 to 31" in dispatch.why_not("depthwise_conv2d", "triton", x, weight, None, 6)
    assert dispatch.why_not("depthwise_conv2d", "triton", x, weight, None, 5) is None
    for part, call in zip(PARTS, ((x, weight, None, 1), (x, x, weight, 1), (x, x, weight, 1)), strict=True):
        assert dispatch.why_not(part, "triton", *call) is None


@pytest.mark.parametrize("part", PARTS)
def test_the_choice_on_cuda_is_by_a_table(part, monkeypatch):
    """PyTorch's convolution where it was measured to be the faster, for maps of about that size; nothing is timed."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    depthwise._fastest.cache_clear()

    def choice(height: int, asked: str = "auto") -> str:
        with FakeTensorMode(), torch.device("cuda"):
            x, weight = torch.empty(2, 8, height, 20), torch.empty(8, 1, 7, 7)
            call = (x, weight, None, 1) if part == depthwise.FORWARD else (x, x, weight, 1)
            return depthwise.choose_fastest(part, asked, x, weight, *call)

    assert choice(20) == "triton"
    key = depthwise.choice_key(part, torch.device("cuda"), torch.float32, (2, 8, 20, 20), 7)
    monkeypatch.setattr(depthwise, "measured_choices", lambda: {key: "torch"})
    depthwise._fastest.cache_clear()
    assert [choice(height) for height in (20, 22, 40)] == ["torch", "torch", "triton"]
    assert choice(20, asked="triton") == "triton"
    depthwise._fastest.cache_clear()


# ---- numba's kernels ------------------------------------------------------------------------------------------------

TRAINING = {
    "three": Case((2, 20, 9, 8), 3, "channels last"),
    "three, dilated": Case((1, 16, 12, 7), 3, bias=False, dilation=4),
    "dilated beyond the map": Case((2, 5, 3, 2), 3, "channels last", dilation=5),
    "five": Case((2, 33, 6, 11), 5, "channels last", dilation=2),
    "nine": Case((3, 17, 5, 10), 9, "channels last", dilation=2),
    "eleven": Case((1, 8, 20, 13), 11, "half of channels last"),
    "thirteen": Case((2, 4, 14, 14), 13),
    "fifteen": Case((1, 3, 16, 1), 15, "channels last"),
    "seventeen": Case((1, 40, 18, 19), 17, "channels last", bias=False),
    "nineteen": Case((1, 2, 8, 21), 19),
}


@pytest.mark.skipif(INTERPRETED, reason="Triton's kernels are taken")
@pytest.mark.parametrize("name", [*SMALL, *TRAINING])
def test_training_on_cpu(name):
    """Values and gradients in float32, of every kernel size and layout, with the same bits again."""
    pytest.importorskip("numba")
    case = (SMALL | TRAINING)[name]
    inputs = [x if x is None else x.requires_grad_() for x in make_inputs(case)]
    exact = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
    ours = {part: {"cpu": dispatch.TABLE[part]["cpu"]} for part in PARTS}
    with patch.dict(dispatch.TABLE, ours):
        actual = with_gradients(lambda *x: depthwise_conv2d(*x, case.dilation), inputs)
        again = with_gradients(lambda *x: depthwise_conv2d(*x, case.dilation), inputs)
    expected = with_gradients(lambda *x: convolve(*x, case.dilation), exact, torch.float32)
    for found, wanted in zip(actual, expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() <= TOLERANCE["float32"] * wanted.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize(
    ("why", "taken"),
    [("float32", True), ("float64", False), ("no gradient", False), ("torch asked for", True), ("scripted", False)],
)
def test_operator_where_it_trains_on_cpu(why, taken):
    """Inference, other types and scripts take PyTorch's convolution; a choice of backend holds within the operator."""
    pytest.importorskip("numba")
    x, weight, bias = make_inputs(SMALL["the kernel's size"], torch.float64 if why == "float64" else torch.float32)
    weight.requires_grad_(why != "no gradient")
    call = torch.jit.script(DilatedRepConv(3, 7, deploy=True)) if why == "scripted" else None
    with Calls() as calls, backend("torch" if why == "torch asked for" else "auto"):
        (call(x) if call else depthwise_conv2d(x, weight, bias)).sum()
    assert ("overlock.depthwise_conv2d.default" in calls.names) == taken


# ---- the operator ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="takes PyTorch's convolution")
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "half of channels last"])
@pytest.mark.parametrize("bias", [True, False])
def test_operator(layout, bias):
    """One node in a graph, with the values, gradients and layout of the convolution."""
    inputs = [x if x is None else x.requires_grad_() for x in make_inputs(Case((2, 6, 8, 9), 7, layout, bias))]
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    output = torch.compile(operator, backend=keep, fullgraph=True)(*inputs)
    assert output.stride() == torch.empty_like(inputs[0]).stride()
    assert sum("overlock" in str(node.target) for node in graphs[0].graph.nodes) == 1
    for found, wanted in zip(with_gradients(operator, inputs), with_gradients(convolve, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(torch.ops.overlock.depthwise_conv2d.default, (*inputs, 1))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_gradients_not_asked_for(frozen):
    """Are not computed, and the others are as before."""
    inputs = make_inputs(SMALL["the kernel's size"])
    for i, x in enumerate(inputs):
        x.requires_grad_(i != frozen)
    with patch.dict(dispatch.TABLE, {part: {} for part in PARTS[1:][frozen : frozen + 1]}):
        actual = with_gradients(operator, inputs)
    for found, wanted in zip(actual, with_gradients(convolve, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_autocast():
    """As convolutions under autocast; gradients come in the parameters' types."""
    x, weight, bias = make_inputs(SMALL["the kernel's size"])
    with torch.autocast("cpu", torch.bfloat16):
        output = operator(x, weight.requires_grad_(), bias)
        assert torch.equal(output, convolve(x, weight, bias))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("in_dims", [(0, None, None), (2, None, None), (None, 0, 0), (1, 0, None)])
def test_vmap(in_dims):
    """Over images and over weights, values and gradients, as of PyTorch's convolution."""
    inputs = make_inputs(SMALL["smaller than the kernel"], torch.float64)
    inputs = [
        (x if dim is None else torch.stack([x, -x, x.flip(-1)], dim)).requires_grad_()
        for x, dim in zip(inputs, in_dims, strict=True)
    ]
    actual, expected = (with_gradients(torch.func.vmap(call, in_dims), inputs) for call in (operator, convolve))
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted)


# ---- where it is taken ----------------------------------------------------------------------------------------------


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The operations that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def trained():
    """Inputs that want gradients, and the operator's result."""
    x, weight = torch.randn(2, 4, 9, 9).requires_grad_(), torch.randn(4, 1, 7, 7).requires_grad_()
    return (x, weight), depthwise_conv2d(x, weight)


def test_gradients_of_what_was_checked_are_not_checked_again(monkeypatch):
    """Backward runs the kernels at once; a mode that watches operations meets the operators."""
    checked = []
    fits = depthwise._INPUTS._fits
    monkeypatch.setattr(depthwise._INPUTS, "_fits", lambda *inputs: checked.append(1) or fits(*inputs))
    inputs, y = trained()
    assert len(checked) == 1
    alone = torch.autograd.grad(y, inputs, y.detach(), retain_graph=True)
    assert len(checked) == 1
    with Calls() as calls:
        watched = torch.autograd.grad(y, inputs, y.detach())
    assert {f"overlock.depthwise_conv2d_{part}_gradient.default" for part in ("input", "weight")} <= {*calls.names}
    torch.testing.assert_close(alone, watched, rtol=0, atol=0)


def test_gradients_of_a_batch_of_gradients():
    """Backward under vmap."""
    inputs, y = trained()
    each = [torch.autograd.grad(y, inputs, scale * y.detach(), retain_graph=True) for scale in (1, 2)]
    batch = torch.autograd.grad(y, inputs, torch.stack([y.detach(), 2 * y.detach()]), is_grads_batched=True)
    torch.testing.assert_close(batch, tuple(map(torch.stack, zip(*each, strict=True))))


@pytest.mark.parametrize(("device", "size", "operator"), [("cuda", 7, True), ("cuda", 5, False), ("cpu", 7, False)])
def test_operator_on_cuda_for_large_kernels(device, size, operator, monkeypatch):
    """Elsewhere PyTorch's convolution, which exporters and counters of operations know. It shows without a GPU."""
    monkeypatch.setattr(depthwise, "convolve", lambda x, *_: x)
    with FakeTensorMode(), torch.device(device), Calls() as calls:
        depthwise_conv2d(torch.empty(2, 4, 9, 9), torch.empty(4, 1, size, size), torch.empty(4))
    assert ("overlock.depthwise_conv2d.default" in calls.names) == operator


@torch.no_grad()
@pytest.mark.parametrize(
    ("form", "convolutions"),
    [
        (lambda module: module, 1 + len(branches_of(9))),
        (lambda module: module.fold(), 1),
        (lambda module: fuse(ConvNorm(module, 4).double()), 1),
    ],
    ids=["training form", "merged", "fused"],
)
def test_every_form_of_the_layer_takes_it(form, convolutions):
    """The training form for each branch, what it merges to once, and so what a fused network has of it."""
    module = form(randomise(DilatedRepConv(4, 9)).double())
    x = images(2, 4, 8, 7, dtype=torch.float64)
    expected = module(x)
    with patch("overlock.layers.depthwise_conv.depthwise_conv2d", operator), Calls() as calls:
        torch.testing.assert_close(module(x), expected)
    assert calls.names.count("overlock.depthwise_conv2d.default") == convolutions
