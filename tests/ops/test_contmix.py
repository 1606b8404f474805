"""The dynamic convolution against plain loops over tokens and taps, in values and gradients."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import oracle
import pytest
import torch
from calls import LAYOUTS, NAMES, make_inputs, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overlock.kernels.torch import contmix as portable
from overlock.ops import BACKENDS, backend, contmix, region_centres

PORTABLE = ("torch", "reference")


@st.composite
def calls(draw):
    """Shapes of a call, the largest maps for the smaller kernels to keep the loops short."""
    kernel_size = draw(st.integers(1, 9))
    longest = 11 if kernel_size <= 4 else 8
    return {
        "batch": draw(st.integers(1, 2)),
        "groups": draw(st.integers(1, 3)),
        "depth": draw(st.integers(1, 4)),
        "channels": draw(st.integers(1, 4)),
        "height": draw(st.integers(1, longest)),
        "width": draw(st.integers(1, longest)),
        "kernel_size": kernel_size,
        "grid": draw(st.integers(1, 4)),
        "bias": draw(st.booleans()),
        "rpb": draw(st.booleans()),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "seed": draw(st.integers(0, 1000)),
    }


@pytest.mark.parametrize("name", PORTABLE)
@settings(max_examples=60)
@given(call=calls(), band=st.sampled_from([1, 2000, portable.BAND_NUMBERS]))
def test_values_and_gradients_equal_the_loops(name, call, band):
    """Any shape, kernel size, layout and tiling, with and without biases."""
    inputs = make_inputs(**call, requires_grad=True)
    k = call["kernel_size"]
    expected, expected_gradients = with_gradients(lambda **x: oracle.contmix(**x, kernel_size=k), inputs)
    with backend(name), patch.object(portable, "BAND_NUMBERS", band):
        actual, gradients = with_gradients(lambda **x: contmix(**x, kernel_size=k), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PORTABLE)
@given(call=calls(), min_side=st.integers(1, 9))
def test_enlarged_maps_equal_the_loops(name, call, min_side):
    """Maps with a side below ``min_side`` are enlarged for the mixing and averaged back."""
    inputs = make_inputs(**call, requires_grad=True)
    rest = {"kernel_size": call["kernel_size"], "min_side": min_side}
    if max(call["height"], call["width"]) * min_side > 16 * min(call["height"], call["width"]):
        return  # long strips grow beyond what loops can do
    expected, expected_gradients = with_gradients(lambda **x: oracle.enlarged_contmix(**x, **rest), inputs)
    with backend(name):
        actual, gradients = with_gradients(lambda **x: contmix(**x, **rest), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    grid=st.integers(1, 7),
    min_side=st.integers(0, 9),
    channels_last=st.booleans(),
)
def test_region_centres_equal_the_means(size, grid, min_side, channels_last):
    """Means over an S x S grid of a map of any size, enlarged where it is small; values and gradients."""
    context = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if channels_last:
        context = context.contiguous(memory_format=torch.channels_last)
    inputs = {"context": context.requires_grad_()}
    expected, (expected_gradient,) = with_gradients(
        lambda context: oracle.adaptive_average(oracle.enlarge(context, min_side), (grid, grid)), inputs
    )
    actual, (gradient,) = with_gradients(lambda context: region_centres(context, grid, min_side), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PORTABLE)
@pytest.mark.parametrize(("kernel_size", "height", "width"), [(3, 5, 4), (4, 6, 5), (5, 3, 7), (5, 4, 4)])
def test_gradcheck(name, kernel_size, height, width):
    """Gradients against finite differences: odd, even, and kernels that reach over the map."""
    inputs = make_inputs(kernel_size=kernel_size, height=height, width=width, requires_grad=True)
    for min_side in (0, 5):
        with backend(name):
            assert torch.autograd.gradcheck(
                lambda *x, m=min_side: contmix(*x, kernel_size=kernel_size, min_side=m), tuple(inputs.values())
            )


@pytest.mark.parametrize("frozen", NAMES)
def test_inputs_without_gradient(frozen):
    """An input that needs no gradient gets none, and the others keep theirs."""
    inputs = make_inputs(requires_grad=True)
    contmix(**inputs, kernel_size=3).sum().backward()
    expected = {name: x.grad for name, x in inputs.items()}
    inputs = {name: x.detach().requires_grad_(name != frozen) for name, x in inputs.items()}
    contmix(**inputs, kernel_size=3).sum().backward()
    assert inputs.pop(frozen).grad is None
    for name, x in inputs.items():  # close, since a sum depends on where its numbers lie in memory
        torch.testing.assert_close(x.grad, expected[name], rtol=1e-12, atol=1e-14)


def in_the_open(inputs):
    return contmix(**inputs, kernel_size=3)


def compiled(inputs):
    torch.compiler.reset()  # PyTorch 2.6 would take the graph of another autocast dtype
    return torch.compile(in_the_open, fullgraph=True, backend="aot_eager")(inputs)


def scripted(inputs):
    @torch.jit.script
    def mix(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor, rpb: Tensor):
        return torch.ops.overlock.contmix(query, key, value, weight, bias, rpb, 3, 0)

    return mix(**inputs)


@pytest.mark.parametrize("call", [in_the_open, compiled, scripted])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, call):
    """Under autocast the output is of its type and the gradients of the inputs' types, the values those of a cast."""
    inputs = make_inputs(dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype):
        mixed = call(inputs)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, in_the_open({n: x.to(dtype) if n in NAMES[:3] else x for n, x in inputs.items()}))
    mixed.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in inputs.values())


def test_autocast_leaves_float64():
    """As PyTorch's own operations do."""
    with torch.autocast("cpu", torch.bfloat16):
        assert in_the_open(make_inputs()).dtype == torch.float64


@pytest.mark.parametrize(
    "in_dims",
    [dict(query=0, key=0, value=0), dict(value=3), dict(query=5, key=1), dict(query=0, weight=0), dict(bias=1, rpb=1)],
    ids=str,
)
def test_vmap_equals_a_loop(in_dims):
    """Over any inputs and dimensions, in values and gradients."""
    inputs = make_inputs(batch=2, kernel_size=5, rpb="rpb" in in_dims)
    for name, dim in in_dims.items():
        inputs[name] = torch.stack([inputs[name], inputs[name].flip(-1), -inputs[name]], dim)
    inputs = {name: None if x is None else x.requires_grad_() for name, x in inputs.items()}
    dims = [in_dims.get(name) for name in NAMES]

    def mix(*tensors):
        return contmix(*tensors, kernel_size=5, min_side=7)

    def looped(**x):
        return torch.stack(
            [
                mix(*(t if d is None else t.select(d, i) for t, d in zip(x.values(), dims, strict=True)))
                for i in range(3)
            ]
        )

    actual, gradients = with_gradients(lambda **x: torch.func.vmap(mix, tuple(dims))(*x.values()), inputs)
    expected, expected_gradients = with_gradients(looped, inputs)
    torch.testing.assert_close(actual, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_vmap_folds_images_into_one_call():
    """Not a call for each."""
    sizes = []
    inputs = make_inputs(batch=2)
    maps = {name: torch.stack([inputs[name]] * 3) for name in NAMES[:3]}
    rest = {name: inputs[name] for name in NAMES[3:]}
    counting = replace(BACKENDS["torch"], forward=lambda *x: sizes.append(len(x[0])) or portable.forward(*x))
    with patch.dict(BACKENDS, torch=counting), backend("torch"):
        torch.func.vmap(lambda maps: contmix(**maps, **rest, kernel_size=3))(maps)
    assert sizes == [6]


def test_vmap_of_region_centres():
    """The second operator likewise."""
    context = torch.randn(4, 2, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centres = torch.func.vmap(lambda x: region_centres(x, 3, 7))(context)
    torch.testing.assert_close(centres, torch.stack([region_centres(x, 3, 7) for x in context]))


def test_the_thread_count_stays():
    """A call leaves PyTorch's own setting alone."""
    before = torch.get_num_threads()
    contmix(**make_inputs(dtype=torch.float32), kernel_size=3)
    assert torch.get_num_threads() == before


def test_empty_batch():
    """No tokens, no output, zero gradients."""
    inputs = make_inputs(batch=0, requires_grad=True)
    mixed = contmix(**inputs, kernel_size=3)
    assert mixed.shape == inputs["value"].shape
    mixed.sum().backward()
    assert not inputs["weight"].grad.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_keeps_the_layout_of_the_values(layout):
    """What comes channels-last goes on channels-last."""
    inputs = make_inputs(layout=layout)
    assert contmix(**inputs, kernel_size=3).stride() == inputs["value"].stride()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rpb", [True, False])
@pytest.mark.parametrize(("kernel_size", "layout"), [(3, "contiguous"), (9, "channels_last"), (4, "part_of_channels")])
def test_opcheck(bias, rpb, kernel_size, layout):
    """The operator is registered as PyTorch wants it: schema, fake tensors, autograd, dynamic shapes."""
    inputs = make_inputs(
        kernel_size=kernel_size, bias=bias, rpb=rpb, layout=layout, dtype=torch.float32, requires_grad=True
    )
    for min_side in (0, 7):
        torch.library.opcheck(torch.ops.overlock.contmix, (*inputs.values(), kernel_size, min_side))


@pytest.mark.parametrize("min_side", [0, 7])
def test_opcheck_of_region_centres(min_side):
    """The second operator likewise."""
    context = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.library.opcheck(torch.ops.overlock.region_centres, (context, 5, min_side))


def test_unknown_backend_is_refused():
    """A mistyped backend fails at once and lists the known ones."""
    with pytest.raises(ValueError, match=r"'tritn'.*auto, .*torch, reference"), backend("tritn"):
        pass


def test_backend_of_the_environment(monkeypatch):
    """OVERLOCK_BACKEND chooses too; a with block goes before it; a mistyped value is refused."""
    inputs = make_inputs()
    monkeypatch.setenv("OVERLOCK_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="OVERLOCK_BACKEND is 'nonsense'"):
        contmix(**inputs, kernel_size=3)
    with backend("reference"):
        expected = contmix(**inputs, kernel_size=3)
    monkeypatch.setenv("OVERLOCK_BACKEND", "reference")
    assert torch.equal(contmix(**inputs, kernel_size=3), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_of_the_backend_of_the_call(compiled):
    """Also where they are computed outside of its block."""
    inputs = make_inputs(requires_grad=True)
    calls = []
    counting = replace(BACKENDS["reference"], backward=lambda *x: calls.append(x) or BACKENDS["torch"].backward(*x))
    mix = torch.compile(contmix, fullgraph=True, backend="aot_eager") if compiled else contmix
    with patch.dict(BACKENDS, reference=counting):
        with backend("reference"):
            mixed = mix(**inputs, kernel_size=3)
        mixed.sum().backward()
    assert len(calls) == 1
    torch.compiler.reset()
