"""Everything that has the network in it: classifiers, backbones, dense models, another framework's."""

from __future__ import annotations

import timm
import torch
from torch import nn

import overlock
from overlock import detection, segmentation
from overlock.weights.parts import find_network, take_apart

SMALL = dict(num_classes=3, hidden_channels=32)


def classifier(**options):
    return timm.create_model("overlock_atto", **{"num_classes": 3, **options})


def features(**options):
    return timm.create_model("overlock_atto", features_only=True, **options)


class Other(nn.Module):
    """Another framework's model around the backbone, as segmentation_models_pytorch has it."""

    def __init__(self, **options):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.model = features(**options)
        self.decoder = nn.Conv2d(120, 3, 1)


MODELS = dict(
    classifier=classifier,
    features=features,
    pyramid=lambda **k: overlock.Pyramid(classifier(**k)),
    overview=lambda **k: overlock.Pyramid(classifier(**k), overview=True),
    detector=lambda **k: detection.faster_rcnn("overlock_atto", **SMALL, **k),
    cascade=lambda **k: detection.cascade_mask_rcnn("overlock_atto", **SMALL, **k),
    segmenter=lambda **k: segmentation.upernet("overlock_atto", **SMALL, **k),
    other=Other,
)
NORMED = ("pyramid", "overview", "detector", "cascade", "segmenter")


def parts_of(model):
    state = model.state_dict()
    return take_apart(state, find_network(state))


def write(model, path, prefix=""):
    torch.save({prefix + name: tensor for name, tensor in model.state_dict().items()}, path)
    return path
