"""Recorded kernels against the module's own output, and what replacing the prior changes."""

from __future__ import annotations

import pytest
import torch
from helpers import images, randomise, relative_error, tiny
from torch.nn import functional as F

from overlock.analysis.dynamic_kernels import (
    compare,
    kept_prior,
    other_prior,
    record_mixing,
    replaced_prior,
    uniform_prior,
    zero_prior,
)
from overlock.kernels.torch.reference import window_rows


@pytest.fixture(scope="module")
def network():
    return randomise(tiny())


def apply_kernels(kernels):
    """The weighted sums over the windows, position by position."""
    height, width, *extent = kernels.taps.shape[2:]
    value = kernels.value
    small = value.shape[3:]
    if small != (height, width):
        value = F.interpolate(value.flatten(1, 2), size=(height, width), mode="bilinear").unflatten(1, value.shape[1:3])
    rows, columns = window_rows(height, extent[0]), window_rows(width, extent[1])
    out = torch.empty_like(value)
    for i in range(height):
        for j in range(width):
            window = value[..., rows[i][:, None], columns[j]]
            out[..., i, j] = (window * kernels.taps[:, :, None, i, j]).sum(dim=(-2, -1))
    return F.adaptive_avg_pool2d(out.flatten(1, 2), small)


@pytest.mark.parametrize("size", [(160, 192), (48, 64)])  # of the second the maps are enlarged
@torch.no_grad()
def test_kernels_give_the_output_of_the_module(network, size):
    x, outputs = images(2, 3, *size), []
    mixers = [block.mixer.aggregator.mixer for stage in ("stage3", "stage4")
              for block in getattr(network.focus_net, stage).blocks]  # fmt: skip
    hooks = [mixer.register_forward_hook(lambda _, __, output: outputs.append(output)) for mixer in mixers]
    mixings = record_mixing(network, lambda: network(x))
    for hook in hooks:
        hook.remove()
    assert [mixing.name for mixing in mixings] == ["stage 3, block 1", "stage 3, block 2", "stage 4, block 1"]
    for mixer, mixing, output in zip(mixers, mixings, outputs, strict=True):
        assert mixing.affinity.shape[-2:] == (7, 7)
        assert [kernels.taps.shape[-1] for kernels in mixing.kernels] == [5, mixer.kernel_size]
        for kernels in mixing.kernels:
            torch.testing.assert_close(kernels.taps.sum(dim=(-2, -1)), torch.ones(kernels.taps.shape[:4]))
        mixed = torch.cat([apply_kernels(kernels) for kernels in mixing.kernels], dim=1)
        assert relative_error(mixer.out(mixed), output) < 1e-4


@torch.no_grad()
def test_replacing_the_prior(network):
    x, other = images(1, 3, 160, 160), images(1, 3, 96, 128, seed=1)
    own = record_mixing(network, lambda: network(x))
    with kept_prior(network) as priors:
        logits = network(x)
        network(other)
    prior, strange = priors

    def changes(replace):
        with replaced_prior(network, replace):
            return [compare(*pair) for pair in zip(own, record_mixing(network, lambda: network(x)), strict=True)]

    assert all(change.kernels == change.affinity == 0 for change in changes(other_prior(prior)))
    for replace in (other_prior(strange), zero_prior, uniform_prior):
        for change in changes(replace):
            assert 0.001 < change.kernels < 1
            assert change.affinity > 0.01
    with replaced_prior(network, zero_prior):
        assert relative_error(network(x), logits) > 0.01
    assert torch.equal(network(x), logits)  # the hook is gone


def test_uniform_prior_keeps_the_mean():
    prior = images(2, 3, 4, 5)
    uniform = uniform_prior(prior)
    torch.testing.assert_close(uniform.mean(dim=(2, 3)), prior.mean(dim=(2, 3)))
    assert uniform.std(dim=(2, 3)).max() < 1e-6
