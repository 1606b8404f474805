"""Segmentation of whole images, by windows and at scales, against direct computations."""

from __future__ import annotations

import pytest
import torch
from helpers import images
from torch import nn
from torch.nn import functional as F

from overlock.tasks.sliding import segment


class Local(nn.Module):
    """Logits that depend on a pixel, its neighbours and its place in what the network is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        place = torch.linspace(0, 1, x.shape[3]) + torch.linspace(0, 2, x.shape[2])[:, None]
        return self.conv(x) * (1 + place)


@torch.no_grad()
def test_whole_images():
    x, network = images(2, 3, 64, 96), Local()
    torch.testing.assert_close(segment(network, x), network(x).softmax(dim=1))
    assert not network.training


@torch.no_grad()
def test_scales_and_mirrors():
    """Sides up to multiples of 32, logits back to the images' size, the mean of the shares."""
    x, network = images(1, 3, 60, 90), Local()
    expected = 0
    for height, width in ((32, 64), (64, 96), (96, 160)):
        scaled = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
        for flip in (False, True):
            logits = network(scaled.flip(3)).flip(3) if flip else network(scaled)
            logits = F.interpolate(logits, size=(60, 90), mode="bilinear", align_corners=False)
            expected = expected + logits.softmax(dim=1) / 6
    torch.testing.assert_close(segment(network, x, scales=(0.5, 1.0, 1.6), flip=True), expected)


@pytest.mark.parametrize(("size", "window", "stride"), [((64, 96), 32, 20), ((64, 96), 50, None), ((32, 160), 64, 64)])
@torch.no_grad()
def test_windows(size, window, stride):
    """Each pixel's logits are the mean over the windows that it lies in."""
    x, network = images(1, 3, *size), Local()
    step = stride or 2 * window // 3
    total, counts = torch.zeros(1, 4, *size), torch.zeros(size)
    starts = []
    for side in size:
        count = max(0, -(-(side - window) // step)) + 1
        starts.append([max(0, min(i * step, side - window)) for i in range(count)])
    for top in starts[0]:
        for left in starts[1]:
            part = (slice(None), slice(None), slice(top, top + window), slice(left, left + window))
            total[part] += network(x[part])
            counts[part[2:]] += 1
    assert counts.min() >= 1
    torch.testing.assert_close(segment(network, x, window=window, stride=stride), (total / counts).softmax(dim=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scales=()), "scales must be above 0"),
        (dict(scales=(1, 0)), "scales must be above 0"),
        (dict(window=32, stride=40), "stride must be between 1 and the window's 32, got 40"),
        (dict(stride=8), "give window too"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        segment(Local(), images(1, 3, 32, 32), **options)
