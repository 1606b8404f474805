"""The plug-and-play ContMix module against the slow implementation."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import images, randomise, relative_error
from hypothesis import given
from hypothesis import strategies as st

import overlock

OFFICIAL = {
    "query.conv": "weight_query.0",
    "query.norm": "weight_query.1",
    "key.conv": "weight_key.1",
    "key.norm": "weight_key.2",
    "value.conv": "weight_value.0",
    "value.norm": "weight_value.1",
    "kernels": "weight_proj",
    "rpb_small": "rpb1",
    "rpb_large": "rpb2",
    "out.conv": "dyconv_proj.0",
    "out.norm": "dyconv_proj.1",
}


def official_name(name):
    part, _, leaf = name.rpartition(".")
    return OFFICIAL[name] if name in OFFICIAL else f"{OFFICIAL[part]}.{leaf}"


def official_names(module):
    """The module's state under the names that the slow implementation reads."""
    return {official_name(name): tensor for name, tensor in module.state_dict().items()}


def expected_of(module, x, query=None, context=None):
    return oracle.context_mixing(
        official_names(module),
        "",
        x,
        x if query is None else query,
        x if context is None else context,
        grid=module.region_grid,
    )


def make(channels=8, *, groups=2, seed=0, **kwargs):
    return randomise(overlock.ContMix(channels, groups=groups, **kwargs).double(), seed)


@st.composite
def modules(draw):
    """Arguments of a module: channels a multiple of twice the groups, any kernels, query and context of any width."""
    groups = draw(st.integers(1, 3))
    kernel_size = draw(st.integers(2, 7))
    width = st.none() | st.integers(1, 6)
    return {
        "channels": 2 * groups * draw(st.integers(1, 3)),
        "groups": groups,
        "kernel_size": kernel_size,
        "small_kernel": draw(st.none() | st.integers(1, kernel_size - 1)),
        "region_grid": draw(st.integers(1, 5)),
        "query_channels": draw(width),
        "context_channels": draw(width),
        "value_proj": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(arguments=modules(), size=SIZES, context_size=SIZES, batch=st.integers(1, 2))
def test_module_equals_the_slow_one(arguments, size, context_size, batch):
    """Any channels, groups, kernels, grid, widths of query and context, and sizes, also below the kernel."""
    module = make(**arguments)
    channels = arguments["channels"]
    x = images(batch, channels, *size, seed=1, dtype=torch.float64)
    query = images(batch, arguments["query_channels"] or channels, *size, seed=2, dtype=torch.float64)
    context = images(batch, arguments["context_channels"] or channels, *context_size, seed=3, dtype=torch.float64)
    with torch.no_grad():
        actual, expected = module(x, query, context), expected_of(module, x, query, context)
        fused = overlock.fuse(module)(x, query, context)
    assert actual.shape == x.shape
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(14, 20), (7, 7), (5, 9), (9, 5), (1, 1), (1, 12), (3, 33)])
@torch.no_grad()
def test_features_that_ask_about_themselves(height, width):
    """Query and context default to the values."""
    module = make(kernel_size=7)
    x = images(2, 8, height, width, dtype=torch.float64)
    assert relative_error(module(x), expected_of(module, x)) < 1e-10


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_channels_last_all_the_way(batch):
    """What comes channels-last is mixed and projected so, one image too; and with the values of another layout."""
    module = randomise(overlock.layers.ContMix(16, groups=2, kernel_size=7))
    layouts = []
    module.out.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].stride()))
    x = images(batch, 16, 9, 8)
    plain = module(x)
    mixed = module(x.contiguous(memory_format=torch.channels_last))
    assert layouts == [(1152, 72, 8, 1), (1152, 1, 128, 16)]
    assert relative_error(mixed, plain) < 1e-5


@pytest.mark.parametrize("small_kernel", [None, 2])
@pytest.mark.parametrize(("height", "width"), [(4, 5), (2, 4)])
def test_gradcheck(small_kernel, height, width):
    """Gradients of all inputs and parameters against finite differences, with the small map's resizing too."""
    module = make(4, groups=1, kernel_size=3, small_kernel=small_kernel, region_grid=2, context_channels=2)
    inputs = [
        images(1, channels, *size, seed=i, dtype=torch.float64).requires_grad_()
        for i, (channels, size) in enumerate([(4, (height, width)), (4, (height, width)), (2, (3, 3))])
    ]
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(*tensors):
        return torch.func.functional_call(module, dict(zip(names, tensors[3:], strict=True)), tensors[:3])

    assert torch.autograd.gradcheck(run, (*inputs, *parameters))


def test_gradients_equal_the_slow_ones():
    """Autograd through the module and through the loops agree for every parameter."""
    module = make(kernel_size=5, small_kernel=3)
    x = images(2, 8, 6, 7, dtype=torch.float64)
    state = {name: tensor.clone() for name, tensor in official_names(module).items()}
    for name, _ in module.named_parameters():
        state[official_name(name)].requires_grad_()
    cotangent = images(2, 8, 6, 7, seed=9, dtype=torch.float64)
    module(x).backward(cotangent)
    oracle.context_mixing(state, "", x, x, x).backward(cotangent)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, state[official_name(name)].grad, rtol=1e-8, atol=1e-9)


WRONG = {
    "groups": {"channels": 8, "groups": 3},
    "no groups": {"channels": 8, "groups": 0},
    "odd channels": {"channels": 9, "groups": 1},
    "small kernel": {"channels": 8, "groups": 2, "kernel_size": 5, "small_kernel": 5},
    "zero kernel": {"channels": 8, "groups": 2, "small_kernel": 0},
    "zero large kernel": {"channels": 8, "groups": 2, "kernel_size": 0, "small_kernel": None},
    "no regions": {"channels": 8, "groups": 2, "region_grid": 0},
    "no context": {"channels": 8, "groups": 2, "context_channels": 0},
    "half a group": {"channels": 8, "groups": 0.5},
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(arguments):
    """Groups that do not divide the channels, kernels that do not fit, counts that are none."""
    with pytest.raises(ValueError, match=r"groups|kernel|region_grid|context_channels"):
        overlock.ContMix(**arguments)


@pytest.mark.parametrize("arguments", [{"drop_path": 1.0}, {"drop_path": -0.5}, {"ffn_ratio": 0}, {"ffn_ratio": 0.3}])
def test_wrong_arguments_of_the_block_are_refused(arguments):
    """Rates that drop all or less than nothing, a feed-forward network without a width."""
    with pytest.raises(ValueError, match=r"drop_path|hidden_channels"):
        overlock.ContMixBlock(8, groups=2, **arguments)
