"""The small layers against their formulas, their gradients, and their range in half precision."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import images, randomise
from timm.layers import LayerNorm2d
from torch import nn

from overlock.layers import AffineScale, BatchNorm2d, ConvFFN, ConvNorm, GlobalResponseNorm, LocalConv, NormConv
from overlock.layers.checkpointing import checkpoint_block
from overlock.layers.gdsa import make_squeeze_excite

SIZES = [(1, 1), (1, 8), (7, 7), (5, 14), (13, 6)]


def prefixed(module, names=None):
    """A module's state under the name "x", its parts renamed."""
    state = {}
    for name, tensor in module.state_dict().items():
        part, _, leaf = name.rpartition(".")
        part = (names or {}).get(part, part)
        state[".".join(filter(None, ["x", part, leaf]))] = tensor
    return state


def response_state(module, prefix="x"):
    return {
        f"{prefix}.gamma": module.weight.detach().view(1, -1, 1, 1),
        f"{prefix}.beta": module.bias.detach().view(1, -1, 1, 1),
    }


def feed_forward(module, x):
    state = prefixed(module) | response_state(module.norm, "x.norm")
    return oracle.feed_forward(state, ["x.expand", "x.local", "x.norm", "x.project"], x)


def norm_conv(module, x):
    state = prefixed(module)
    return oracle.pointwise(state, "x.conv", oracle.batch_norm(state, "x.norm", x))


LAYERS = {
    "response norm": (
        lambda: GlobalResponseNorm(4),
        lambda module, x: oracle.response_norm(response_state(module), "x", x),
    ),
    "squeeze-excite": (
        lambda: make_squeeze_excite(4),
        lambda module, x: oracle.squeeze_excite(prefixed(module, {"fc1": "proj.1", "fc2": "proj.3"}), "x", x),
    ),
    "layer norm": (
        lambda: LayerNorm2d(4, eps=1e-6),
        lambda module, x: oracle.layer_norm(prefixed(module), "x", x),
    ),
    "batch norm": (
        lambda: BatchNorm2d(4),
        lambda module, x: oracle.batch_norm(prefixed(module), "x", x),
    ),
    "affine scale": (
        lambda: AffineScale(4),
        lambda module, x: oracle.affine_scale(prefixed(module), "x", x),
    ),
    "local convolution": (
        lambda: LocalConv(4),
        lambda module, x: oracle.local_conv(prefixed(module), "x", x),
    ),
    "convolution, norm": (
        lambda: ConvNorm(nn.Conv2d(4, 3, 3, stride=2, padding=1, bias=False), 3),
        lambda module, x: oracle.embedding(prefixed(module), "x.conv", "x.norm", x),
    ),
    "norm, convolution": (
        lambda: NormConv(4, 3),
        norm_conv,
    ),
    "feed-forward": (lambda: ConvFFN(4, 6), feed_forward),
}  # fmt: skip


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("make", "expected"), LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_layer_equals_its_formula(make, expected, height, width):
    """In evaluation and float64, over sizes down to one position."""
    module = randomise(make().double())
    x = images(2, 4, height, width, dtype=torch.float64)
    torch.testing.assert_close(module(x), expected(module, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", [make for make, _ in LAYERS.values()], ids=LAYERS)
def test_gradcheck(make):
    """Gradients of input and parameters against finite differences."""
    module = randomise(make().double())
    x = images(2, 4, 4, 3, dtype=torch.float64).requires_grad_()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(x, *tensors):
        return torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_response_norm_holds_large_values_in_half_precision(dtype):
    """The sum of squares of values near 100 over 200 x 320 positions is far beyond float16, its root is not."""
    module = randomise(GlobalResponseNorm(4))
    x = (100 * images(1, 4, 200, 320)).to(dtype)
    expected = oracle.response_norm({k: v.double() for k, v in response_state(module).items()}, "x", x.double())
    with torch.autocast("cpu", dtype):
        under_autocast = module(x)
    for actual in (module.to(dtype)(x), under_autocast):
        assert actual.isfinite().all()
        assert (actual.double() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_response_norm_has_finite_gradients_in_half_precision(dtype):
    """Backwards too, through maps of zeros as well."""
    module = randomise(GlobalResponseNorm(4))
    x = 100 * images(1, 4, 200, 320)
    x[:, 0] = 0
    x.requires_grad_()
    with torch.autocast("cpu", dtype):
        module(x.to(dtype)).float().mean().backward()
    assert all(t.grad.isfinite().all() for t in (x, module.weight, module.bias))


def test_batch_norm_of_single_values():
    """One 1x1 map in training has no variance: the running statistics norm it and stay as they are."""
    module = randomise(BatchNorm2d(4)).train()
    mean = module.running_mean.clone()
    x = images(1, 4, 1, 1)
    torch.testing.assert_close(module(x), oracle.batch_norm(prefixed(module), "x", x))
    assert torch.equal(module.running_mean, mean)


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.3, 0.0, None])
def test_batch_norm_trains_as_pytorchs(momentum, tracked):
    """Otherwise it is PyTorch's, statistics included: moving averages, that of all batches (None), or none at all."""
    settings = dict(momentum=momentum, track_running_stats=tracked)
    ours, theirs = BatchNorm2d(4, **settings), nn.BatchNorm2d(4, **settings)
    for seed in range(3):
        x = images(2, 4, 3, 5, seed=seed)
        torch.testing.assert_close(ours(x), theirs(x))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_update_bn():
    """PyTorch's function for averaged weights gives the mean of all batches, of a scripted and a traced model too."""
    batches = [images(2, 3, 6, 6, seed=seed) for seed in range(4)]
    make = lambda: ConvNorm(nn.Conv2d(3, 4, kernel_size=1, bias=False), 4)  # noqa: E731
    model = randomise(make())
    for form in (model, torch.jit.script(model), torch.fx.symbolic_trace(model.train())):
        torch.optim.swa_utils.update_bn(batches, form)
        means = torch.stack([model.conv(x).mean((0, 2, 3)) for x in batches])
        torch.testing.assert_close(form.norm.running_mean, means.mean(0))
        assert form.norm.num_batches_tracked == 4


def test_single_values_do_not_count():
    """A batch that leaves the statistics leaves the number of batches too, by which the next one is weighed."""
    norm = BatchNorm2d(4, momentum=None)
    norm(images(1, 4, 1, 1))
    assert norm.num_batches_tracked == 0
    x = images(2, 4, 3, 3)
    norm(x)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointed_block(momentum, reentrant, monkeypatch):
    """Computed twice, a block has the outputs, gradients and running statistics of one call; so it is twice over."""
    monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", reentrant)
    found = []
    for call in (lambda block, x: block(x), checkpoint_block):
        block = nn.Sequential(BatchNorm2d(4, momentum=momentum), nn.GELU(), nn.BatchNorm2d(4, momentum=momentum))
        x = images(2, 4, 5, 5).requires_grad_()
        for _ in range(2):
            y = call(block, x)
            y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_squeeze_excite_in_training(dtype):
    """As in evaluation, in a range whose sum float16 does not have, and with gradients in the layout of the map."""
    layer = make_squeeze_excite(4).to(dtype)
    x = (1000 + images(2, 4, 16, 16)).to(dtype, memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, layer.eval()(x), rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=0)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
