"""The operations of the fused network on CPU against plain PyTorch in float64, and where the kernels cannot run."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from helpers import images
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from overlock.ops import backend, contmix, inference, region_centres, threads

TOLERANCE = 2e-6  # of the largest magnitude
CHANNELS = (1, 8, 15, 16, 17, 33, 64, 100)
MAPS = ((1, 1), (1, 9), (8, 1), (3, 4), (7, 7), (14, 14), (30, 9))
SIZES = (3, 5, 7, 9, 11, 13, 15, 17)


# Plain PyTorch, with the arguments of the operations.


def linear(x, weight, bias):
    return F.linear(x, weight, bias)


def depthwise(x, weight, bias, gelu):
    y = F.conv2d(x, weight.permute(2, 0, 1)[:, None], bias, padding=weight.shape[0] // 2, groups=x.shape[1])
    return F.gelu(y) if gelu else y


def conv(x, weight, bias, stride, gelu):
    y = F.conv2d(x, weight, bias, stride, weight.shape[2] // 2)
    return F.gelu(y) if gelu else y


def squeeze_excite(x, other, gate, reduce_weight, reduce_bias, expand_weight, expand_bias):
    y = x if other is None else x + other
    hidden = F.gelu(F.linear(y.mean(dim=(2, 3)), reduce_weight, reduce_bias))
    y = y * F.linear(hidden, expand_weight, expand_bias).sigmoid()[:, :, None, None]
    return y if gate is None else y * F.silu(gate)


def response_norm(x, weight, bias, eps):
    g = x.square().sum(dim=(2, 3), keepdim=True).sqrt()
    scale = 1 + weight[:, None, None] * g / (g.mean(dim=1, keepdim=True) + eps)
    return x * scale + bias[:, None, None]


def context_mix(query, context, value, key_weight, key_bias, weights, biases, rpbs, region_grid):
    groups, sizes = rpbs[0].shape[0], [(rpb.shape[1] + 1) // 2 for rpb in rpbs]
    key = torch.einsum("oc,bcs->bos", key_weight, region_centres(context, region_grid, max(sizes)).flatten(2))
    key = key if key_bias is None else key + key_bias[:, None]
    query, key = query.unflatten(1, (groups, -1)), key.unflatten(1, (groups, -1))
    with backend("reference"):
        mixed = [
            contmix(query, key, part.unflatten(1, (groups, -1)), weight.t(), bias, rpb, size, max(sizes)).flatten(1, 2)
            for part, weight, bias, rpb, size in zip(
                value.chunk(len(sizes), 1), weights, biases, rpbs, sizes, strict=True
            )
        ]
    return torch.cat(mixed, dim=1)


def conv_ffn(
    x, expand_weight, expand_bias, local_weight, local_bias, norm_weight, project_weight, project_bias, eps
):  # fmt: skip
    hidden = F.gelu(F.conv2d(x, expand_weight[:, :, None, None], expand_bias))
    hidden = depthwise(hidden, local_weight, local_bias, False)
    hidden = response_norm(hidden, norm_weight, torch.zeros_like(norm_weight), eps)
    return F.conv2d(hidden, project_weight[:, :, None, None], project_bias)


PLAIN = {f.__name__: f for f in (linear, depthwise, conv, squeeze_excite, response_norm, context_mix, conv_ffn)}


# Random inputs of each operation for images of a shape.


def draw(*shape: int, seed: int = 1) -> Tensor:
    """Of deviation one after a sum over all but the first dimension."""
    return images(*shape, seed=seed) / max(1, torch.Size(shape[1:]).numel()) ** 0.5


def make_linear(x, size, variant):
    return (x.permute(0, 2, 3, 1), draw(24, x.shape[1]), draw(24) if variant else None)


def make_depthwise(x, size, variant):
    return (x, images(size, size, x.shape[1], seed=1) / size, draw(x.shape[1]), bool(variant))


def make_conv(x, size, variant):
    return (x, draw(24, x.shape[1], size, size), draw(24) if variant else None, 1 + variant, bool(variant))


def make_squeeze_excite(x, size, variant):
    other, gate = (torch.empty_like(x).copy_(images(*x.shape, seed=i)) if variant else None for i in (2, 3))
    return (x, other, gate, draw(16, x.shape[1]), draw(16), draw(x.shape[1], 16), draw(x.shape[1]))


def make_response_norm(x, size, variant):
    return (x, draw(x.shape[1], seed=2), draw(x.shape[1]) * variant, 1e-6)


def make_context_mix(x, size, variant):
    """Two groups of x's channels each, and where ``variant`` is set two sizes and a context of another size."""
    value = torch.cat([x] * 2 * (1 + variant), dim=1).contiguous(memory_format=torch.channels_last)
    sizes, grid = [3, size][1 - variant :], 3
    context = images(x.shape[0], 5, 2 * size, 2 * size) if variant else value
    parameters = [[draw(grid**2, k * k) for k in sizes], [draw(k * k) for k in sizes]]
    parameters += [[draw(2, 2 * k - 1, 2 * k - 1) for k in sizes]]
    query = images(x.shape[0], 6, *x.shape[2:], seed=4) / 4  # logits of order one, whose rounding is small
    return (query, context, value, draw(6, context.shape[1]), draw(6) if variant else None, *parameters, grid)


def make_conv_ffn(x, size, variant):
    width, channels = x.shape[1] * (2 + variant), x.shape[1]
    local = images(size, size, width, seed=2) / size
    parameters = (draw(width, channels), draw(width), local, draw(width), draw(width), draw(channels, width))
    return (x, *parameters, draw(channels), 1e-6)


MAKE = {name: globals()[f"make_{name}"] for name in PLAIN}


def each_tensor(function, arguments):
    """Arguments with a function applied to their tensors, those in lists too."""
    return tuple(
        [function(y) for y in x] if isinstance(x, list) else function(x) if isinstance(x, Tensor) else x
        for x in arguments
    )


def expected_of(name, arguments):
    return PLAIN[name](*each_tensor(lambda x: x.detach().double(), arguments))


def check(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


def make(name, shape=(2, 17, 14, 9), size=5, variant=1, layout=torch.channels_last, dtype=torch.float32):
    x = images(*shape).contiguous(memory_format=layout)
    return each_tensor(lambda x: x.to(dtype), MAKE[name](x, size, variant))


@pytest.fixture(params=[1, 2])
def thread_count(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_values(name):
    """Every count of channels with every map; sizes, batches, layouts and variants take turns."""
    cases = [(channels, extent) for channels in CHANNELS for extent in MAPS]
    for i, (channels, extent) in enumerate(cases):
        batch, size, variant = (1, 3)[i % 2], SIZES[i % len(SIZES)], i // 3 % 2
        layout = (torch.channels_last, torch.contiguous_format)[i // 5 % 2]
        size = min(size, 7) if name == "conv" else size
        arguments = make(name, (batch, channels, *extent), size, variant, layout)
        enlarged = name == "context_mix" and min(extent) < size  # by PyTorch, which rounds its coordinates
        tolerance = 2 * TOLERANCE if enlarged else TOLERANCE
        check(getattr(inference, name)(*arguments), expected_of(name, arguments), tolerance)


@pytest.mark.parametrize(
    ("name", "shape", "size", "variant"),
    [
        ("linear", (2, 640, 32, 32), 1, 1),
        ("depthwise", (1, 20, 40, 33), 17, 1),
        ("conv", (2, 3, 64, 65), 3, 1),
        ("squeeze_excite", (1, 40, 40, 30), 1, 1),
        ("squeeze_excite", (9, 24, 20, 20), 1, 1),
        ("response_norm", (1, 40, 40, 30), 1, 1),
        ("context_mix", (1, 17, 40, 30), 13, 1),
        ("conv_ffn", (2, 96, 31, 33), 3, 1),  # scales to the weights
        ("conv_ffn", (3, 256, 10, 10), 3, 1),  # scales to the tokens, packed
        ("conv_ffn", (3, 64, 80, 80), 3, 0),  # several chunks
    ],
)
@torch.no_grad()
def test_values_of_large_calls(name, shape, size, variant, thread_count):
    """Packed products, several pieces of a map and several chunks of a batch, on one thread and two."""
    arguments = make(name, shape, size, variant)
    check(getattr(inference, name)(*arguments), expected_of(name, arguments))


def test_large_calls_are_large():
    """The thresholds lie below the sizes above."""
    assert inference.PACKED_FROM < 2 * 32 * 32 * 640 * 24
    assert inference.PACKED_FROM < 3 * 10 * 10 * 256 * 768
    assert inference.CHUNK < 3 * 80 * 80 * 128 * 4


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_threads_agree_and_runs_repeat(name, monkeypatch):
    """The same numbers at every run; one thread, two, and two without OpenMP differ by rounding at most."""
    arguments = make(name, (1, 33, 30, 20))
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(getattr(inference, name)(*arguments))
            assert torch.equal(getattr(inference, name)(*arguments), results[-1])
        monkeypatch.setattr(threads, "_parallel_region", lambda: None)
        assert torch.equal(getattr(inference, name)(*arguments), results[-1])
    finally:
        torch.set_num_threads(before)
    check(results[0], results[1].double(), 5e-7)


def run_all(results):
    torch.set_num_threads(1)
    with torch.no_grad():
        results.put({name: getattr(inference, name)(*make(name)).sum().item() for name in PLAIN})


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@torch.no_grad()
def test_forked_process():
    """On one thread, as in a worker of DataLoader: more than one hang in OpenMP, PyTorch's operations too."""
    expected = {name: getattr(inference, name)(*make(name)).sum().item() for name in PLAIN}
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=run_all, args=(results,))
    process.start()
    try:
        assert results.get(timeout=60) == expected
    finally:
        process.kill()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_what_is_not_finite_comes_out(name, value):
    """Where PyTorch has a finite number there is one, elsewhere none."""
    x = images(2, 17, 14, 9).contiguous(memory_format=torch.channels_last)
    x[1, 3, 6, 4] = value
    arguments = MAKE[name](x, 5, 1)
    actual, expected = getattr(inference, name)(*arguments), expected_of(name, arguments)
    assert not expected.isfinite().all()
    assert torch.equal(actual.isfinite(), expected.isfinite())


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_large_values(name):
    arguments = MAKE[name](1e4 * images(2, 17, 14, 9), 5, 1)
    check(getattr(inference, name)(*arguments), expected_of(name, arguments))


# What the kernels do not do


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_other_types(name):
    """Float64 exactly, bfloat16 to its eight bits; the type stays."""
    arguments = make(name, dtype=torch.float64)
    check(getattr(inference, name)(*arguments), expected_of(name, arguments), 1e-12)
    arguments = make(name, dtype=torch.bfloat16)
    actual = getattr(inference, name)(*arguments)
    assert actual.dtype == torch.bfloat16
    check(actual, expected_of(name, arguments), 3e-2)


@pytest.mark.parametrize("which", ["images", "parameters"])
@pytest.mark.parametrize("name", PLAIN)
def test_gradients(name, which):
    """Those of plain PyTorch, to the images and to parameters that want them."""
    arguments, grads = make(name), []
    for cast, call in ((Tensor.float, getattr(inference, name)), (Tensor.double, PLAIN[name])):
        inputs = each_tensor(lambda x, cast=cast: cast(x.detach()).clone(), arguments)
        tensors = [x for group in inputs for x in (group if isinstance(group, list) else [group])]
        leaves = [x for x in tensors if isinstance(x, Tensor) and (x.dim() == 4) == (which == "images")]
        if name == "conv" and which == "images":
            leaves = leaves[:1]
        for leaf in leaves:
            leaf.requires_grad_()
        call(*inputs).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert grads[0]
    for actual, expected in zip(*grads, strict=True):
        check(actual, expected, 5e-6)


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_without_numba(name, monkeypatch):
    arguments = make(name)
    monkeypatch.setattr(inference, "numba_installed", lambda: False)
    with backend("torch"):  # contmix asks for itself
        check(getattr(inference, name)(*arguments), expected_of(name, arguments))


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_empty_batch(name):
    arguments = make(name, (0, 8, 9, 9))
    assert getattr(inference, name)(*arguments).shape == expected_of(name, arguments).shape


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_default_type_is_no_matter(name):
    """A default of float64 does not change what the kernels read and write."""
    arguments = make(name, (1, 17, 9, 9))
    expected = expected_of(name, arguments)
    torch.set_default_dtype(torch.float64)
    try:
        actual = getattr(inference, name)(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    check(actual, expected)


@torch.no_grad()
def test_context_smaller_than_the_kernel_is_enlarged():
    """A context has a size of its own."""
    arguments = list(make("context_mix", size=7))
    arguments[1] = images(2, 5, 4, 6)
    check(inference.context_mix(*arguments), expected_of("context_mix", arguments))


@torch.no_grad()
def test_a_changed_weight_is_packed_anew():
    """Changed in place, or given other memory as Module.to does."""
    for name in ("linear", "conv"):
        arguments = list(make(name, (2, 640, 32, 32), size=3, variant=0))
        weight = torch.nn.Parameter(arguments[1], requires_grad=False)
        arguments[1] = weight
        for change in (
            lambda w: w.mul_(2),
            lambda w: setattr(w, "data", w.data * 3),
            lambda w: setattr(w, "data", w.data.bfloat16()),
            lambda w: setattr(w, "data", w.data.float()),
        ):
            change(weight)
            if weight.dtype == torch.float32:
                check(getattr(inference, name)(*arguments), expected_of(name, arguments), 1e-5)


@torch.inference_mode()
def test_weight_made_in_inference_mode():
    """It has no version to ask for."""
    arguments = make("linear", (2, 640, 32, 32))
    check(inference.linear(*arguments), expected_of("linear", arguments))


@torch.no_grad()
def test_packed_convolution_takes_maps_of_other_sizes():
    """It is packed for the first."""
    _, *others = make("conv", (2, 17, 14, 9), size=3)
    for shape in ((2, 17, 14, 9), (1, 17, 40, 40), (5, 17, 3, 3)):
        arguments = (images(*shape), *others)
        check(inference.conv(*arguments), expected_of("conv", arguments))


# PyTorch's tools


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("name", PLAIN)
def test_registration(name, layout):
    """PyTorch's own checks of an operator: schema, shapes without data, dispatch, graphs."""
    arguments = make(name, layout=layout)
    torch.library.opcheck(getattr(torch.ops.overlock, name).default, arguments)


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*")
def test_what_follows_each_operation(name):
    """A trace, a transform, a mode: they get PyTorch's operations, which they know."""
    arguments = make(name, (2, 8, 9, 9))
    call, (x, *others) = getattr(inference, name), arguments
    expected = expected_of(name, arguments)
    if name not in ("context_mix", "squeeze_excite"):  # other images come with the first
        check(torch.func.vmap(lambda image: call(image[None], *others)[0])(x), expected)
        check(torch.jit.trace(lambda image: call(image, *others), (x,))(x), expected)
    with FlopCounterMode(display=False) as counter:
        call(*arguments)
    assert counter.get_total_flops() > 0 or name == "response_norm"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(*each_tensor(mode.from_tensor, arguments))
    assert fake.shape == expected.shape
