"""Recorded kernels against the module's own output, and what replacing the prior changes."""

from __future__ import annotations

import pytest
import torch
from helpers import images, randomise, relative_error, tiny
from pictures import make_image
from PIL import Image
from torch.nn import functional as F

from overlock.analysis.backbones import Preparation, find_backbone, find_overlock
from overlock.analysis.dynamic_kernels import (
    compare,
    kept_prior,
    other_prior,
    record_mixing,
    replaced_prior,
    uniform_prior,
    zero_prior,
)
from overlock.checkpoints import Record
from overlock.kernels.torch.reference import window_rows
from overlock.tasks.detection import faster_rcnn


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


@torch.no_grad()
def test_detectors():
    detector = randomise(faster_rcnn("overlock_atto", num_classes=2, hidden_channels=16))
    record = Record(model="overlock_atto", head="faster_rcnn", classes=("a", "b"))
    image, prepare = make_image("red", 0, 48).resize((48, 32)), Preparation(detector, record, 64)
    x = prepare(image)
    assert x.shape == (1, 3, 64, 96)
    mixings = record_mixing(find_overlock(detector, ""), lambda: find_backbone(detector)(x))
    assert [mixing.stage for mixing in mixings] == [3, 3, 3, 4]
    assert mixings[-1].kernels[-1].value.shape[3:] == (2, 3)


def test_networks_without_dynamic_kernels():
    with pytest.raises(ValueError, match="mine: there are no dynamic kernels in this network"):
        find_overlock(torch.nn.Conv2d(3, 3, 1), "mine")
    with pytest.raises(ValueError, match="build it with output_stride 32"):
        find_overlock(tiny(output_stride=16), "mine")


def test_images_are_prepared_whole():
    """A bright quarter is the same quarter of the tensor; networks of one size get their square."""
    image = Image.new("RGB", (40, 20))
    image.paste("white", (20, 0, 40, 10))
    record = Record(model="", classes=("a", "b"), preprocessing=dict(input_size=(3, 32, 32)))
    for network, size in ((tiny(), (32, 64)), (torch.nn.Identity(), (32, 32))):
        x = Preparation(network, record)(image)
        assert x.shape == (1, 3, *size)
        rows, columns = (side // 2 for side in size)
        assert x[..., : rows - 2, columns + 2 :].min() > 2
        assert x[..., rows + 2 :, :].max() < -1


def test_uniform_prior_keeps_the_mean():
    prior = images(2, 3, 4, 5)
    uniform = uniform_prior(prior)
    torch.testing.assert_close(uniform.mean(dim=(2, 3)), prior.mean(dim=(2, 3)))
    assert uniform.std(dim=(2, 3)).max() < 1e-6
