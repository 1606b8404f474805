"""The fused forms on CUDA against the folded modules: in Triton's interpreter, in a process of its own, and compiled.

Whole networks run on fake tensors, which know a device and refuse to be read: what waits for the GPU fails there.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from itertools import product
from unittest.mock import Mock, patch

import pytest
import torch
from helpers import images, randomise, run_interpreted, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from overlock import fuse
from overlock.blocks import BasicBlock, ContMixBlock, DynamicBlock
from overlock.fused import conditions, cuda_layers
from overlock.fused import fuse as fuse_module
from overlock.fused.cuda_operators import (
    add_bias,
    excitation,
    filter_and_scale,
    local_gelu,
    local_norm,
    response_norm,
    scaled_pointwise,
)
from overlock.fused.forms import ON_CUDA
from overlock.layers import Aggregator, ContMix, ConvFFN
from overlock.network.base_net import Stem
from overlock.ops import backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with the interpreter")
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
on_devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=GPU)]
)  # fmt: skip
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def on_devices_in_types(argument: str, names: Iterable[str], in_16_bits: tuple[str, ...]) -> pytest.MarkDecorator:
    """All names in all types on a GPU; in the interpreter, which is slow, only some in 16 bits, whose code is alike."""
    pairs = list(product(names, TOLERANCE))
    some = [(name, dtype) for name, dtype in pairs if dtype == torch.float32 or name in in_16_bits]
    cases = [pytest.param(*pair, "cpu", marks=interpreted) for pair in some]
    cases += [pytest.param(*pair, "cuda", marks=GPU) for pair in pairs]
    return pytest.mark.parametrize((argument, "dtype", "device"), cases)


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(__file__, "-m", "not gpu and not slow", "-k", "cpu")


def exact(x, weight, bias, norm_weight, eps):
    """Of numbers in float64."""
    y = F.conv2d(F.gelu(x), weight, bias, padding=1, groups=x.shape[1])
    norms = y.square().sum((2, 3)).sqrt()
    return y, 1 + norm_weight * norms / (norms.mean(1, keepdim=True) + eps)


SHAPES = {
    "more than a block, a tile and a piece": (1, 130, 9, 6),
    "narrow": (1, 8, 3, 7),
    "one position": (3, 5, 1, 1),
    "one row": (1, 16, 1, 9),
    "contiguous": (1, 24, 5, 6),
}
on_shapes = on_devices_in_types("name", SHAPES, in_16_bits=("narrow", "one position"))


@on_shapes
def test_filter_and_scale(name, dtype, device):
    """Both results in each type, at the borders of tiles, and the same bits again."""
    shape = SHAPES[name]
    channels = shape[1]
    layout = torch.contiguous_format if name == "contiguous" else torch.channels_last
    x = images(*shape).to(memory_format=layout)
    inputs = [x, images(channels, 1, 3, 3, seed=1) / 3, images(channels, seed=2), images(channels, seed=3)]
    inputs = [t.to(dtype).to(device) for t in inputs]
    found = filter_and_scale(*inputs, 1e-6)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(found, exact(*(t.double() for t in inputs), 1e-6), strict=True):
        assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(found, filter_and_scale(*inputs, 1e-6), strict=True))


def test_filter_and_scale_refuses():
    x, weight = torch.zeros(1, 4, 5, 5), torch.zeros(3, 1, 3, 3)
    with pytest.raises(ValueError, match="weight of filter_and_scale must be"):
        filter_and_scale(x, weight, torch.zeros(4), torch.zeros(4), 1e-6)


CHOICES = {
    "plain": dict(),
    "scaled": dict(scale=True),
    "gated, with a scaled residual": dict(scale=True, gate=True, residual=True, residual_scale=True),
    "with a residual": dict(residual=True),
    "silu": dict(silu=True),
}


@on_devices_in_types("choice", CHOICES, in_16_bits=("gated, with a scaled residual",))
def test_scaled_pointwise(choice, dtype, device):
    """Every factor and term, with several tiles of rows, outputs and channels, and maps that are part of another."""
    wanted = CHOICES[choice]
    batch, height, width = 3, 9, 7
    inputs, outputs = (70, 130) if dtype == torch.float32 else (24, 40)
    make = {
        "scale": (batch, inputs), "gate": (batch, inputs, height, width), "residual": (batch, outputs, height, width),
        "residual_scale": (outputs,),
    }  # fmt: skip
    conv = torch.nn.Conv2d(inputs, outputs, 1).to(device, dtype)
    both = images(batch, 2 * inputs, height, width).to(device, dtype, memory_format=torch.channels_last)
    x = both[:, inputs:]
    given = {
        name: images(*shape, seed=i).to(device, dtype) for i, (name, shape) in enumerate(make.items()) if name in wanted
    }
    with torch.no_grad():
        found = scaled_pointwise(x, conv, **given, silu="silu" in wanted)
        exact = {name: t.double() for name, t in given.items()}
        scaled = x.double() * exact.get("scale", torch.ones(1, 1, device=device))[:, :, None, None]
        expected = F.conv2d(scaled * exact.get("gate", 1), conv.weight.double(), conv.bias.double())
        expected = F.silu(expected) if "silu" in wanted else expected
        factor = exact.get("residual_scale", torch.ones(1, device=device)).view(-1, 1, 1)
        expected = expected + factor * exact.get("residual", 0)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def _layer_norm(x, weight, bias, eps):
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)


@on_shapes
def test_local_convolutions(name, dtype, device):
    """With the norm after it, whose mean is far from zero, and with GELU."""
    shape = SHAPES[name]
    channels = shape[1]
    given = [images(*shape), images(channels, 1, 3, 3, seed=1) / 3, images(channels, seed=2) + 3]
    given += [images(channels, seed=3), images(channels, seed=4)]
    x, weight, bias, *norm = (t.to(dtype).to(device) for t in given)
    exact = [t.double() for t in (x, weight, bias, *norm)]
    convolved = F.conv2d(*exact[:3], padding=1, groups=channels)
    found = [*local_norm(x, weight, bias, *norm, 1e-6), local_gelu(x, weight, bias)]
    expected = [convolved, _layer_norm(convolved, *exact[3:], 1e-6), F.gelu(convolved)]
    for a, b in zip(found, expected, strict=True):
        assert a.is_contiguous(memory_format=torch.channels_last)
        assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()


@on_shapes
def test_scales_of_channels(name, dtype, device):
    """Squeeze-excite, whose hidden channels are no multiple of a step, and the response norm; the same bits again."""
    shape = SHAPES[name]
    channels, hidden = shape[1], 18
    given = [images(hidden, channels, 1, 1, seed=1), images(hidden, seed=2), images(channels, hidden, 1, 1, seed=3)]
    x, *layers, weight, bias = (
        t.to(dtype).to(device)
        for t in (images(*shape), *given, images(channels, seed=4), images(channels, seed=5), images(channels, seed=6))
    )
    exact = [t.double() for t in (x, *layers, weight, bias)]
    inner = F.gelu(F.conv2d(exact[0].mean((2, 3), keepdim=True), *exact[1:3]))
    excited = F.conv2d(inner, *exact[3:5]).sigmoid().flatten(1)
    norms = exact[0].square().sum((2, 3), keepdim=True).sqrt()
    scales = 1 + exact[5][:, None, None] * norms / (norms.mean(1, keepdim=True) + 1e-6)
    normed = exact[0] * scales + exact[6][:, None, None]
    for _ in range(2):
        for a, b in ((excitation(x, *layers), excited), (response_norm(x, weight, bias, 1e-6), normed)):
            assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()
    assert torch.equal(excitation(x, *layers), excitation(x, *layers))


def make_modules():
    """Folded modules with a form on CUDA, and their inputs."""
    block = fuse(randomise(BasicBlock(8, kernel_size=7, scaled=True)), kernels=False)
    mixer = ContMix(8, groups=2, kernel_size=5, small_kernel=3, context_channels=4)
    aggregator = fuse(randomise(Aggregator(8, 12, kernel_size=7, mixer=mixer)), kernels=False)
    dynamic = fuse(randomise(DynamicBlock(8, 4, groups=2, kernel_size=7)), kernels=False)
    plugin = fuse(randomise(ContMixBlock(8, groups=2, kernel_size=7)), kernels=False)
    return {
        "basic block": (block, [images(2, 8, 6, 7)]),
        "dynamic block": (dynamic, [images(2, 8, 7, 7), *(images(2, 4, 7, 7, seed=i) for i in (1, 2))]),
        "ContMix block": (plugin, [images(1, 8, 8, 7)]),
        "stem": (fuse(randomise(Stem(3, 12)), kernels=False), [images(2, 3, 17, 16)]),
        "ffn": (fuse(randomise(ConvFFN(6, 20)), kernels=False), [images(1, 6, 9, 8)]),
        "aggregator": (aggregator, [images(1, 8, 7, 7), images(1, 8, 7, 7, seed=1), images(1, 4, 7, 7, seed=2)]),
    }


def as_list(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


FORMS = {
    "basic block": cuda_layers.FusedBasicBlock,
    "dynamic block": cuda_layers.FusedDynamicBlock,
    "ContMix block": cuda_layers.FusedContMixBlock,
    "stem": cuda_layers.FusedStem,
    "ffn": cuda_layers.FusedConvFFN,
    "aggregator": cuda_layers.FusedAggregator,
}


@torch.no_grad()
@on_devices
@pytest.mark.parametrize("name", FORMS)
def test_forms_give_what_the_modules_give(name, device, monkeypatch):
    module, inputs = make_modules()[name]
    module, inputs = module.to(device), [x.to(device) for x in inputs]
    keys = module.state_dict().keys()
    with backend("torch"):
        expected = as_list(module(*inputs))
    calls = []
    for operator in (scaled_pointwise, add_bias):
        called = functools.partial(lambda run, *call, **more: calls.append(run) or run(*call, **more), operator)
        monkeypatch.setattr(cuda_layers, operator.__name__.removesuffix(".default"), called)
    form = FORMS[name](module).eval()
    for found, wanted in zip(as_list(form(*inputs)), expected, strict=True):
        assert (found - wanted).abs().max() <= 5e-6 * wanted.abs().max()
    assert calls
    assert form.state_dict().keys() == keys


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_the_modules_where_kernels_cannot_run(name):
    """On CPU, and where gradients are wanted, which they have."""
    if INTERPRETED:
        pytest.skip("there they can")
    module, inputs = make_modules()[name]
    leaves = [x.requires_grad_() for x in inputs]
    expected = as_list(module(*leaves))[0]
    found = as_list(FORMS[name](module).eval()(*leaves))[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    cotangent = images(*expected.shape, seed=3)
    for a, b in zip(
        *(torch.autograd.grad(y, leaves, cotangent, allow_unused=True) for y in (found, expected)), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture
def fused(monkeypatch):
    """A network in the forms for CUDA, on CPU."""
    monkeypatch.setattr(fuse_module, "ON_CUDA", ON_CUDA._replace(kinds=frozenset({("cpu", torch.bfloat16)})))
    return fuse(randomise(tiny()).to(torch.bfloat16))


def move_to_fake_gpu(model):
    """Onto a device that is not there."""
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, x in own.items():
                own[name] = (
                    None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
                )


def test_a_network_takes_the_forms(fused):
    """All of its blocks and ConvFFNs, with weights channels last."""
    kinds = [type(module).__name__ for module in fused.modules()]
    assert kinds.count("FusedBasicBlock") == 4
    assert kinds.count("FusedDynamicBlock") == kinds.count("FusedGDSA") == kinds.count("FusedAggregator") == 3
    assert kinds.count("FusedConvFFN") == 4 + 3
    assert not {"Stem", "BasicBlock", "DynamicBlock", "ConvFFN", "Aggregator"} & set(kinds)
    weights = [p for p in fused.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_nothing_waits_for_the_gpu(fused, monkeypatch):
    """No number is read on the way, in a whole inference."""
    monkeypatch.setattr(cuda_layers, "triton_applies", lambda *_: True)  # it would see the mode of fake tensors
    with FakeTensorMode(), torch.inference_mode():
        move_to_fake_gpu(fused)
        x = torch.empty(2, 3, 224, 160, dtype=torch.bfloat16, device="cuda")
        with patch.object(cuda_layers, "filter_and_scale", Mock(wraps=filter_and_scale)) as called:
            assert fused(x).shape == (2, 5)
        assert called.call_count == 7


def test_one_graph_for_all_batches(fused):
    """Nothing breaks the graph, and another batch takes the same one."""
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return lambda *_: (None,)  # nothing is run

    with torch.no_grad(), patch.object(conditions, "_triton_is_wanted", lambda _: True):
        compiled = torch.compile(fused, backend=keep, fullgraph=True, dynamic=None)
        for batch in (2, 3, 5):
            x = images(batch, 3, 64, 32).to(torch.bfloat16)
            torch._dynamo.mark_dynamic(x, 0)
            compiled(x)
    assert len(graphs) == 1
    called = [node.target for node in graphs[0].graph.nodes if "filter_and_scale" in str(node.target)]
    assert len(called) == 7
