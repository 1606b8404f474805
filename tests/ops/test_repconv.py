"""All branches of a Dilated RepConv at once, against the modules in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import randomise
from torch import nn

import overlock
from overlock.layers import DilatedRepConv
from overlock.layers.dilated_repconv import branches_of
from overlock.ops import backend

# Channels beside a multiple of 16, maps smaller than the kernel, more than one tile, a single image.
CASES = [(2, 20, 9, 30, 17), (1, 16, 5, 6, 13), (2, 7, 1, 3, 7), (1, 3, 66, 70, 9), (3, 33, 12, 11, 5), (2, 4, 8, 8, 3)]
CASES += [pytest.param(1, 17, 66, 135, k, marks=pytest.mark.slow) for k in (11, 15, 19, 21)]


def make(channels, kernel_size, seed=0):
    return randomise(DilatedRepConv(channels, kernel_size), seed).train()


def make_images(batch, channels, height, width):
    x = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))
    return (3 + 2 * x).contiguous(memory_format=torch.channels_last)


def calls_operator(module, x):
    """Whether the module does, forward."""
    with torch.profiler.profile() as profile:
        module(x)
    return "overlock::dilated_repconv" in {event.key for event in profile.key_averages()}


def train(module, x):
    """Result, gradients of all and the buffers after a step."""
    x = x.detach().clone().requires_grad_(x.is_leaf)
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y))
    named = dict(module.named_parameters()) | {"x": x}
    return {"y": y.detach()} | {f"of {n}": p.grad for n, p in named.items()} | dict(module.named_buffers())


@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize(("batch", "channels", "height", "width", "kernel_size"), CASES)
def test_values_gradients_and_statistics(batch, channels, height, width, kernel_size, choice):
    """Of the operator, in every backend; twice with the same bits. PyTorch's sums depend on the processor."""
    bound = 1e-4 if choice == "torch" else 5e-5
    module, x = make(channels, kernel_size), make_images(batch, channels, height, width)
    exact = train(copy.deepcopy(module).double(), x.double())
    with backend(choice):
        found, again = (train(copy.deepcopy(module), x) for _ in range(2))
    assert found["y"].stride() == x.stride()
    for name, value in exact.items():
        assert (found[name] - value).abs().max() <= bound * value.abs().max().clamp(min=1e-2), name
        assert torch.equal(found[name], again[name]), name


def test_large_means():
    """Statistics of values far from zero: a thousand deviations."""
    module, x = make(16, 7), 1000 + make_images(2, 16, 20, 20)
    with torch.no_grad():
        for weight in (module.large.weight, *(branch.conv.weight for branch in module.branches.values())):
            weight.zero_()[:, :, weight.shape[2] // 2, weight.shape[3] // 2] = 1
    exact, found = train(copy.deepcopy(module).double(), x.double()), train(module, x)
    torch.testing.assert_close(found["norm.running_var"].double(), exact["norm.running_var"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["y"].double(), exact["y"], rtol=1e-3, atol=1e-3)


def test_statistics_are_those_of_batch_norm():
    """Their momentum and correction, and the count of batches, over several batches."""
    module = make(4, 7)
    other = copy.deepcopy(module)
    for norm in (m for m in other.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.register_forward_hook(lambda *_: None)  # a watched module is called
    for step in range(3):
        x = make_images(2, 4, 6, 5 + step).requires_grad_()
        assert calls_operator(module, x)
        assert not calls_operator(other, x)
    for (name, found), expected in zip(module.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


class OwnNorm(nn.BatchNorm2d):
    pass


def evaluate_one(module):
    module.branches["k3_r2"].norm.eval()


def freeze_statistics(module):
    module.norm.track_running_stats, module.norm.running_mean, module.norm.running_var = False, None, None


def exchange(module):
    module.norm = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4))


def own(module):
    module.branches["k3_r1"].norm = OwnNorm(4)


def without_scale(module):
    module.norm = nn.BatchNorm2d(4, affine=False)


def other_momentum(module):
    module.branches["k5_r1"].norm.momentum = None


def parametrise(module):
    torch.nn.utils.parametrizations.weight_norm(module.large)


def cut_off(module):
    module.branches["k3_r3"] = nn.Identity()


CHANGES = [
    evaluate_one, freeze_statistics, exchange, own, without_scale, other_momentum, parametrise, cut_off,
    nn.Module.eval, nn.Module.double, DilatedRepConv.reparameterize,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_modules_that_differ_are_called(change):
    """As they were before the operator."""
    module = make(4, 7)
    change(module)
    x = make_images(2, 4, 8, 8).to(module.large.weight.dtype).requires_grad_()
    assert not calls_operator(module, x)


def test_without_gradients_modules_are_called():
    """A plain pass keeps nothing of the branches."""
    with torch.no_grad():
        assert not calls_operator(make(4, 7), make_images(2, 4, 8, 8))


@pytest.mark.parametrize("frozen", ["weight", "norm", "x"])
def test_only_gradients_that_are_wanted(frozen):
    """Some parameters, or the images, need none."""
    module, x = make(20, 7), make_images(2, 20, 9, 10)
    if frozen == "x":
        x.requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(frozen == "x" or (frozen == "norm") != ("norm" in name))
    exact, found = train(copy.deepcopy(module).double(), x.double()), train(module, x)
    for name, value in exact.items():
        if value is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-4, atol=1e-4, msg=name)


def test_refusals():
    """In one sentence."""
    x, taps, norm = make_images(1, 4, 5, 5), torch.ones(9, 4), torch.ones(1, 4)
    call = torch.ops.overlock.dilated_repconv
    with pytest.raises(ValueError, match=r"taps of dilated_repconv must be \(T, C\)"):
        call(x, torch.ones(8, 4), norm, norm, [3], [1], 1e-5)
    with pytest.raises(ValueError, match="odd kernel size"):
        call(x, torch.ones(16, 4), norm, norm, [4], [1], 1e-5)
    with pytest.raises(ValueError, match="odd kernel size"):
        call(x, taps, norm, norm, [3], [0], 1e-5)


def test_derivatives_of_second_order():
    """A gradient penalty through the operator."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        module, x = make(4, 5).to(dtype), make_images(2, 4, 6, 7).to(dtype).requires_grad_()
        (of_x,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
        of_x.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in module.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_compiles_to_one_node():
    """And gives what it gives without."""
    module, x = make(4, 5), make_images(2, 4, 6, 7)
    other = copy.deepcopy(module)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    found = train(module, x)
    x = x.clone().requires_grad_()
    y = compiled(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y))
    torch.testing.assert_close(y.detach(), found["y"])
    torch.testing.assert_close(x.grad, found["of x"])
    for (name, buffer), expected in zip(other.named_buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)


def test_branches_fit_the_kernels():
    """No kernel size has more of them than there is room for."""
    assert all(1 + len(branches_of(k)) <= 8 for k in range(3, 33, 2))
    assert overlock.DilatedRepConv is DilatedRepConv


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("batch", "channels", "height", "width", "kernel_size"), [CASES[0], CASES[3], CASES[4]])
def test_bfloat16(batch, channels, height, width, kernel_size, autocast):
    """Images in bfloat16, sums in float32: as autocast has them, or in a network of that type."""
    module, x = make(channels, kernel_size), make_images(batch, channels, height, width).bfloat16()
    exact = train(copy.deepcopy(module.to(torch.float32 if autocast else torch.bfloat16)).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert calls_operator(copy.deepcopy(module), x.float() if autocast else x)
        found = train(module, x)
    assert found["y"].dtype == found["of x"].dtype == torch.bfloat16
    for name, value in exact.items():
        if value.is_floating_point():
            assert (found[name] - value).norm() <= 2**-5 * value.norm(), name
            assert found[name].dtype == (torch.bfloat16 if name in {"y", "of x"} or not autocast else torch.float32)


@pytest.mark.parametrize(("batch", "channels", "height", "width", "kernel_size"), CASES)
def test_taps_in_pairs(batch, channels, height, width, kernel_size, monkeypatch):
    """As one by one; without the processor's dot product too, though by default only with it."""
    module, x = make(channels, kernel_size), make_images(batch, channels, height, width).bfloat16()
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(weight.bfloat16())
    results = []
    for in_pairs in (False, True):
        for name in ("repconv", "repconv_gradients"):
            monkeypatch.setattr(f"overlock.kernels.numba.{name}.takes_pairs", lambda _, own=in_pairs: own)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(train(copy.deepcopy(module), x))
    for name, value in results[0].items():
        if value.is_floating_point():
            assert (results[1][name] - value).norm() <= 2**-7 * value.norm(), name
