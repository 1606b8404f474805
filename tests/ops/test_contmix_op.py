"""The dynamic convolution against plain loops over tokens and taps, in values and gradients."""

from __future__ import annotations

from unittest.mock import patch

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overlock.ops import backend, contmix, portable, region_centres

NAMES = ("query", "key", "value", "weight", "bias", "rpb")
BACKENDS = ("torch", "reference")


def make_inputs(
    *, batch=1, groups=2, depth=3, channels=2, height=6, width=7, kernel_size=3, grid=2, bias=True, rpb=True, seed=0,
    layout="contiguous", dtype=torch.float64, requires_grad=False,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Random inputs of one call, maps in one of the memory layouts that networks bring."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def draw_map(part: int) -> Tensor:
        if layout == "channels_last":
            return draw(batch, groups, height, width, part).permute(0, 1, 4, 2, 3)
        if layout == "part_of_channels":
            return draw(batch, 2 * groups * part, height, width)[:, groups * part :].unflatten(1, (groups, part))
        if layout == "every_second":
            return draw(batch, groups, part, 2 * height, 2 * width)[..., ::2, 1::2]
        if layout == "transposed":
            return draw(batch, groups, part, width, height).transpose(3, 4)
        return draw(batch, groups, part, height, width)

    taps, side = kernel_size**2, 2 * kernel_size - 1
    inputs = {
        "query": draw_map(depth),
        "key": draw(batch, groups, depth, grid**2),
        "value": draw_map(channels),
        "weight": draw(taps, grid**2),
        "bias": draw(taps) if bias else None,
        "rpb": draw(groups, side, side) if rpb else None,
    }
    return {name: x if x is None else x.requires_grad_(requires_grad) for name, x in inputs.items()}


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
        "layout": draw(
            st.sampled_from(["contiguous", "channels_last", "part_of_channels", "every_second", "transposed"])
        ),
        "seed": draw(st.integers(0, 1000)),
    }


def with_gradients(function, inputs, cotangent=None):
    """Output and gradients of a call, the cotangent drawn after the output's shape."""
    output = function(**inputs)
    if cotangent is None:
        generator = torch.Generator().manual_seed(7)
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    tensors = [x for x in inputs.values() if x is not None]
    return output.detach(), torch.autograd.grad(output, tensors, cotangent, materialize_grads=True)


@pytest.mark.parametrize("name", BACKENDS)
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


@pytest.mark.parametrize("name", BACKENDS)
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


@pytest.mark.parametrize("name", BACKENDS)
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
    for name, x in inputs.items():
        assert x.grad is None if name == frozen else torch.equal(x.grad, expected[name])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@settings(max_examples=15)
@given(call=calls())
def test_lower_precision(dtype, tolerance, call):
    """float32, bfloat16 and float16 stay near the loops in float64 on the same rounded inputs."""
    inputs = make_inputs(**call, dtype=dtype)
    exact = {name: x if x is None else x.double() for name, x in inputs.items()}
    actual = contmix(**inputs, kernel_size=call["kernel_size"])
    assert actual.dtype == dtype
    expected = oracle.contmix(**exact, kernel_size=call["kernel_size"])
    assert (actual.double() - expected).abs().max() <= tolerance * inputs["value"].abs().max()


def test_logits_beyond_float16():
    """Affinities in the ten thousands, which float16 sums cannot hold, mix to finite values."""
    inputs = make_inputs(depth=64, dtype=torch.float16, seed=3)
    inputs["query"], inputs["key"] = inputs["query"] * 40, inputs["key"] * 40
    assert contmix(**inputs, kernel_size=3).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Under autocast the output is of its type and the gradients of the inputs' types."""
    inputs = make_inputs(dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype):
        mixed = contmix(**inputs, kernel_size=3)
    assert mixed.dtype == dtype
    mixed.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in inputs.values())


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


WRONG = {
    "query": ({"query": torch.zeros(1, 2, 6, 7)}, "takes query"),
    "key": ({"key": torch.zeros(1, 2, 4, 4)}, "key must be"),
    "value": ({"value": torch.zeros(1, 2, 2, 6, 6)}, "value must be"),
    "weight": ({"weight": torch.zeros(9, 5)}, "weight must be"),
    "bias": ({"bias": torch.zeros(8)}, "bias must be"),
    "rpb": ({"rpb": torch.zeros(2, 3, 3)}, "rpb must be"),
    "kernel_size": ({"kernel_size": 0}, "kernel_size 0"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_shapes_are_named(change, message):
    """The argument that does not fit is named."""
    with pytest.raises(ValueError, match=message):
        contmix(**{**make_inputs(dtype=torch.float32), "kernel_size": 3, **change})


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


@pytest.mark.filterwarnings("ignore:overlock..contmix_backward:UserWarning")
def test_second_derivative_is_refused():
    """There is no formula for it: an error, not a wrong number."""
    inputs = make_inputs(requires_grad=True)
    (gradient,) = torch.autograd.grad(contmix(**inputs, kernel_size=3).pow(2).sum(), inputs["value"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.pow(2).sum(), inputs["query"])
