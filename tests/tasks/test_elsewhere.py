"""The backbones in the frameworks that people already use."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers import images
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

import overlock

SIZE = (64, 96)


@pytest.mark.parametrize("kind", ["Unet", "FPN", "UPerNet"])
def test_segmentation_models_pytorch(kind):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, kind)("tu-overlock_atto", encoder_weights=None, classes=3)
    logits = model.train()(images(2, 3, *SIZE))
    assert logits.shape == (2, 3, *SIZE)
    logits.square().mean().backward()
    assert all(p.grad is not None for name, p in model.encoder.named_parameters() if "stage4" in name)


def test_transformers():
    """As the backbone of its UperNet; its features are timm's."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.TimmBackboneConfig(
        backbone="overlock_atto", use_pretrained_backbone=False, out_indices=(0, 1, 2, 3)
    )
    model = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=settings, hidden_size=16, num_labels=3)
    ).eval()
    x = images(1, 3, *SIZE)
    with torch.no_grad():
        assert model(x).logits.shape == (1, 3, *SIZE)
        network = timm.create_model("overlock_atto", features_only=True).eval()
        assert [tuple(f.shape) for f in model.backbone(x).feature_maps] == [tuple(f.shape) for f in network(x)]


def test_torchvision():
    """In its own Faster R-CNN, with the normed pyramid and its own feature pyramid network."""
    pyramid = overlock.Pyramid(timm.create_model("overlock_atto"))
    channels = [int(info["num_chs"]) for info in pyramid.feature_info]
    torchvision_fpn = pytest.importorskip("torchvision.ops").FeaturePyramidNetwork(channels, 64)

    class Backbone(torch.nn.Module):
        out_channels = 64

        def __init__(self):
            super().__init__()
            self.pyramid, self.fpn = pyramid, torchvision_fpn

        def forward(self, x):
            return self.fpn({str(i): f for i, f in enumerate(self.pyramid(x))})

    anchors = AnchorGenerator(tuple((s,) for s in (32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 4)
    model = FasterRCNN(Backbone(), num_classes=3, rpn_anchor_generator=anchors, min_size=64, max_size=128)
    model.rpn._post_nms_top_n = dict(training=20, testing=20)
    target = dict(boxes=torch.tensor([[5.0, 5, 40, 50]]), labels=torch.tensor([1]))
    losses = model.train()([images(1, 3, *SIZE)[0]], [target])
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        assert set(model.eval()([images(1, 3, *SIZE)[0]])[0]) == {"boxes", "scores", "labels"}
