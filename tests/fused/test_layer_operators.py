"""The single layers of the fused network on CPU against plain PyTorch in float64, and where the kernels cannot run."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from helpers import images
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from overlock.fused import conditions
from overlock.fused import layer_operators as inference
from overlock.kernels.numba import runtime as threads

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


PLAIN = {f.__name__: f for f in (linear, depthwise)}


# Random inputs of each operation for images of a shape.


def draw(*shape: int, seed: int = 1) -> Tensor:
    """Of deviation one after a sum over all but the first dimension."""
    return images(*shape, seed=seed) / max(1, torch.Size(shape[1:]).numel()) ** 0.5


def make_linear(x, size, variant):
    return (x.permute(0, 2, 3, 1), draw(24, x.shape[1]), draw(24) if variant else None)


def make_depthwise(x, size, variant):
    return (x, images(size, size, x.shape[1], seed=1) / size, draw(x.shape[1]), bool(variant))


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
        arguments = make(name, (batch, channels, *extent), size, variant, layout)
        check(getattr(inference, name)(*arguments), expected_of(name, arguments))


@pytest.mark.parametrize(
    ("name", "shape", "size", "variant"),
    [
        ("linear", (2, 640, 32, 32), 1, 1),
        ("depthwise", (1, 20, 40, 33), 17, 1),
    ],
)
@torch.no_grad()
def test_values_of_large_calls(name, shape, size, variant, thread_count):
    """Packed products and several pieces of a map, on one thread and two."""
    arguments = make(name, shape, size, variant)
    check(getattr(inference, name)(*arguments), expected_of(name, arguments))


def test_large_calls_are_large():
    """The threshold lies below the size above."""
    assert inference.PACKED_FROM < 2 * 32 * 32 * 640 * 24


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
    monkeypatch.setattr(conditions, "numba_installed", lambda: False)
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
def test_a_changed_weight_is_packed_anew():
    """Changed in place, or given other memory as Module.to does."""
    arguments = list(make("linear", (2, 640, 32, 32), variant=0))
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
            check(inference.linear(*arguments), expected_of("linear", arguments), 1e-5)


@torch.inference_mode()
def test_weight_made_in_inference_mode():
    """It has no version to ask for."""
    arguments = make("linear", (2, 640, 32, 32))
    check(inference.linear(*arguments), expected_of("linear", arguments))


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
    check(torch.func.vmap(lambda image: call(image[None], *others)[0])(x), expected)
    check(torch.jit.trace(lambda image: call(image, *others), (x,))(x), expected)
    with FlopCounterMode(display=False) as counter:
        call(*arguments)
    assert counter.get_total_flops() > 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(*each_tensor(mode.from_tensor, arguments))
    assert fake.shape == expected.shape
