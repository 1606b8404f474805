"""Dilated RepConv: the training form, the merged form and plain sums over taps are one convolution."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import images, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import overlock
from overlock.layers.dilated_repconv import DilatedRepConv, branches_of

KERNEL_SIZES = range(3, 24, 2)


def official_names(module):
    """The module's state under the names that the slow implementation reads."""
    state = {}
    for name, tensor in module.state_dict().items():
        if name.startswith("branches."):
            _, branch, part, leaf = name.split(".")
            k, r = branch.removeprefix("k").split("_r")
            state[f"x.dil_{'conv' if part == 'conv' else 'bn'}_k{k}_{r}.{leaf}"] = tensor
        else:
            state["x." + name.replace("large.", "lk_origin.").replace("norm.", "origin_bn.")] = tensor
    return state


@settings(max_examples=60)
@given(
    kernel_size=st.sampled_from(KERNEL_SIZES),
    channels=st.integers(1, 4),
    size=st.tuples(st.integers(1, 26), st.integers(1, 26)),
    seed=st.integers(0, 1000),
)
def test_all_forms_equal_the_sum_over_taps(kernel_size, channels, size, seed):
    """Kernel sizes 3 to 23, any channels, maps smaller than the kernel: training, merged and fused form."""
    module = randomise(overlock.DilatedRepConv(channels, kernel_size).double(), seed)
    x = images(2, channels, *size, seed=seed, dtype=torch.float64)
    with torch.no_grad():
        expected = oracle.dilated_repconv(official_names(module), "x", x)
        torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(overlock.fuse(module)(x), expected, rtol=1e-10, atol=1e-10)
        module.reparameterize()
        torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
        merged = oracle.dilated_repconv(official_names(module), "x", x)
    torch.testing.assert_close(merged, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
def test_merged_state_loads_where_the_form_is_built_merged(kernel_size):
    """reparameterize leaves one convolution, whose state fits deploy=True; a second call changes nothing."""
    module = randomise(overlock.DilatedRepConv(3, kernel_size), seed=1)
    module.reparameterize()
    module.reparameterize()
    built = overlock.DilatedRepConv(3, kernel_size, deploy=True)
    built.load_state_dict(module.state_dict())
    assert set(built.state_dict()) == {"large.weight", "large.bias"}
    x = images(1, 3, 9, 30)
    assert torch.equal(module(x), built(x))
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
def test_branches_reach_no_further_than_the_kernel(kernel_size):
    """So that they merge into it."""
    for branch in overlock.DilatedRepConv(1, kernel_size).branches.values():
        assert branch.conv.dilation[0] * (branch.conv.kernel_size[0] - 1) + 1 <= kernel_size


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(kernel_size, training):
    """Gradients of input and parameters against finite differences, with batch and with running statistics."""
    module = randomise(overlock.DilatedRepConv(2, kernel_size).double()).train(training)
    x = images(2, 2, 4, 3, dtype=torch.float64).requires_grad_()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(x, *tensors):
        return torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("kernel_size", [1, 4, 0, -3])
def test_wrong_kernels_are_refused(kernel_size):
    """Even or too small."""
    with pytest.raises(ValueError, match="odd and at least 3"):
        overlock.DilatedRepConv(4, kernel_size)


@pytest.mark.parametrize("which", ["norm", "branches.k3_r2.norm"])
def test_norms_without_statistics_do_not_merge(which):
    """They go by their batch in evaluation too. The layer stays as it is, and in training."""
    module = DilatedRepConv(4, 7).train()
    module.set_submodule(which, nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="running statistics"):
        module.reparameterize()
    assert module.training
    assert not module.merged
    assert len(module.branches) == len(branches_of(7))
