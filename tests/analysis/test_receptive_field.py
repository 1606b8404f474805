"""Receptive fields against theory: stacked convolutions, whose field is known exactly."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import timm
import torch
from helpers import images, randomise
from torch import nn

from overlock.analysis.backbones import make_stages, stage_indices
from overlock.analysis.receptive_field import (
    central_scores,
    find_centre,
    measure_fields,
    side_of,
    square_curve,
)
from overlock.tasks.detection import faster_rcnn
from overlock.tasks.segmentation import upernet


def stack(depth: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolutions of equal weights, the first with a stride."""
    layers = [nn.Conv2d(3, 3, 3, padding=1, stride=stride if i == 0 else 1, bias=False) for i in range(depth)]
    for layer in layers:
        nn.init.constant_(layer.weight, 1 / 27)
    return nn.Sequential(*layers).double()


def spread(depth: int, size: int) -> np.ndarray:
    """One axis of the field of such a stack: the sum of so many steps of -1, 0 or 1, which are alike."""
    row = np.ones(1)
    for _ in range(depth):
        row = np.convolve(row, np.full(3, 1 / 3))
    out = np.zeros(size)
    middle = size // 2
    out[middle - depth : middle + depth + 1] = row
    return out


@pytest.mark.parametrize("gradient", ["relu", "abs"])
def test_stacked_convolutions(gradient):
    depth, size = 12, 65
    x = torch.rand(2, 3, size, size, dtype=torch.float64)
    (field,) = measure_fields(lambda x: [stack(depth)(x)], [x], wanted=[1], gradient=gradient)
    expected = spread(depth, size)
    np.testing.assert_allclose(field.scores, np.outer(expected, expected), atol=1e-12)
    assert field.centre == pytest.approx((size / 2, size / 2))
    deviation = math.sqrt(depth * 2 / 3)
    for share in (0.2, 0.5, 0.9):  # Luo et al.: a Gaussian; a square holds the product of two axes
        gaussian = 2 * deviation * NormalDist().inv_cdf((1 + math.sqrt(share)) / 2)
        side, error = field.side(share)
        assert side == pytest.approx(gaussian, abs=0.6)
        assert error == pytest.approx(0, abs=1e-9)  # a linear network looks at all images alike
    assert field.side(1.0)[0] == pytest.approx(2 * depth + 1, abs=1)


def test_field_of_a_strided_stack_lies_where_it_looks():
    """The middle of 16 x 16 cells of stride 4 is cell 8, which padding 1 centres on pixel 32, not between 31 and 32."""
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    (field,) = measure_fields(lambda x: [stack(1, stride=4)(x)], [x], wanted=[1])
    assert field.centre == pytest.approx((32.5, 32.5))
    assert field.curves[0, 3] == pytest.approx(1)
    assert field.curves[0, 1] == pytest.approx(1 / 9)


def test_sides_by_counting_squares():
    """As scripts for large-kernel networks count: grow an odd square around the middle pixel."""
    scores = torch.rand(41, 41, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    scores[15:26, 15:26] += 4
    curve = square_curve(scores, (20.5, 20.5))
    for share in (0.2, 0.3, 0.5, 0.99):
        half = next(
            i for i in range(1, 21) if scores[20 - i : 21 + i, 20 - i : 21 + i].sum() / scores.sum() >= share
        )  # fmt: skip
        assert 2 * half - 1 < side_of(curve, share) <= 2 * half + 1
    assert curve[0] == 0
    assert float(curve[-1]) == pytest.approx(1)
    assert (curve.diff() > -1e-12).all()


def test_centre_is_the_median():
    scores = torch.zeros(10, 20)
    scores[3, 7] = 1
    assert find_centre(scores) == pytest.approx((3.5, 7.5))


def test_relu_takes_what_is_positive():
    x = torch.ones(1, 1, 3, 3, requires_grad=True)
    weight = torch.tensor([[1.0, -2.0, 0.0]])
    features = torch.stack([(x * weight).sum(), -x.sum()]).view(1, 2, 1, 1)  # -3 and -9
    assert central_scores(features, x, "relu").sum() == 0
    assert central_scores(features, x, "abs").squeeze().tolist() == [[0, 3, 1]] * 3
    assert central_scores(-features, x, "relu").squeeze().tolist() == [[0, 3, 1]] * 3


@pytest.mark.parametrize(
    ("reductions", "indices"),
    [([4, 8, 16, 32], [0, 1, 2, 3]), ([2, 4, 8, 16, 32], [1, 2, 3, 4]), ([16] * 12, [2, 5, 8, 11]),
     ([4, 8, 16, 16], [0, 1, 2, 3]), ([2, 4, 8, 16, 16, 32], [1, 2, 4, 5]), ([16], [0, 0, 0, 0])],
)  # fmt: skip
def test_stages_of_timm(reductions, indices):
    assert stage_indices([dict(reduction=reduction) for reduction in reductions]) == indices


@pytest.mark.parametrize("name", ["overlock_atto", "resnet10t"])
def test_networks(name):
    network = randomise(timm.create_model(name, num_classes=2))
    fields = measure_fields(make_stages(network, name), [images(2, 3, 128, 96)])
    assert [field.stage for field in fields] == [3, 4]
    for field in fields:
        assert field.scores.shape == (128, 96)
        assert float(field.scores.sum()) == pytest.approx(1)
        sides = [field.side(share)[0] for share in (0.2, 0.3, 0.5, 0.99)]
        assert 0 < sides[0] < sides[1] < sides[2] < sides[3] <= 2 * 128
        assert all(field.side(share)[1] > 0 for share in (0.2, 0.5))


def test_faults():
    x = torch.rand(1, 3, 33, 33, dtype=torch.float64)
    with pytest.raises(ValueError, match="stages are 1 to 1, got 3"):
        measure_fields(lambda x: [stack(1)(x)], [x])
    with pytest.raises(ValueError, match="no images"):
        measure_fields(lambda x: [x], [])
    with pytest.raises(ValueError, match="try --gradient abs"):
        measure_fields(lambda x: [-stack(1)(x)], [x], wanted=[1])


def test_backbones_of_detectors_and_segmenters():
    pytest.importorskip("transformers")
    x = images(1, 3, 64, 64)
    for backbone in ("overlock_atto", "resnet10t"):
        detector = randomise(faster_rcnn(backbone, num_classes=2, hidden_channels=16))
        segmenter = randomise(upernet(backbone, num_classes=2, hidden_channels=16))
        for network, features in ((detector, detector.backbone.body), (segmenter, segmenter.backbone)):
            fields = measure_fields(make_stages(network, ""), [x], wanted=[2, 4])
            pixels = x.clone().requires_grad_()
            (expected,) = central_scores(list(features(pixels))[3], pixels)
            torch.testing.assert_close(fields[1].scores, expected / expected.sum())


def test_the_published_recipe_misses_where_a_feature_looks():
    """Squares around the middle of the image, for a feature that looks half a stride beside it: docs/evidence.md."""
    x = torch.rand(1, 3, 224, 224, dtype=torch.float64)
    layers = [nn.Conv2d(3, 3, 3, padding=1, stride=2, bias=False) for _ in range(5)]  # 7 x 7 features of stride 32
    for layer in layers:
        nn.init.constant_(layer.weight, 1 / 27)
    network = nn.Sequential(*layers).double()
    (field,) = measure_fields(lambda x: [network(x)], [x], wanted=[1])
    assert field.centre == pytest.approx((96.5, 96.5))
    scores = field.scores.numpy()
    half = next(i for i in range(1, 112) if scores[112 - i : 113 + i, 112 - i : 113 + i].sum() > 0.5)
    assert 2 * half + 1 > field.side(0.5)[0] + 15
