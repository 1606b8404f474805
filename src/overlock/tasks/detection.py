"""Faster and Mask R-CNN on torchvision's detection parts, set up as the released models are (section 4.2)."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from overlock.tasks.features import STRIDES, make_features
from overlock.tasks.masks import paste

LEVELS = ("0", "1", "2", "3")  # the maps of the pyramid that regions are taken from


class PyramidBackbone(nn.Module):
    """A backbone and a feature pyramid on its four features.

    Images (B, 3, H, W) to maps (B, C, H / stride, W / stride) of strides 4 to 64, by the names that torchvision's heads
    look for.

    Args:
        features: the backbone, images to four features.
        channels: of the features.
        hidden_channels: C.
    """

    def __init__(self, features: nn.Module, channels: tuple[int, ...], hidden_channels: int = 256):
        super().__init__()
        self.body = features
        self.fpn = FeaturePyramidNetwork(list(channels), hidden_channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = hidden_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict(zip(LEVELS, self.body(x), strict=True)))


class ExactAnchors(AnchorGenerator):
    """Anchors of three aspect ratios whose sides are not rounded, as the released models have them."""

    def __init__(self) -> None:
        strides = (*STRIDES, 2 * STRIDES[-1])
        super().__init__(tuple((8 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides))

    def generate_anchors(
        self,
        scales: Any,
        aspect_ratios: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008  # torchvision's signature
    ) -> Tensor:
        side = torch.as_tensor(scales, dtype=dtype, device=device)
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        width, height = (side / root).flatten(), (side * root).flatten()
        return torch.stack([-width, -height, width, height], dim=1) / 2


class AlignedRoIAlign(MultiScaleRoIAlign):
    """Regions by RoIAlign with the half-pixel shift, and as many samples as a region has pixels.

    Args:
        output_size: side of the pooled regions.
    """

    def __init__(self, output_size: int):
        super().__init__(list(LEVELS), output_size, sampling_ratio=0)
        self.level_of = LevelMapper(2, 5, self.canonical_scale, self.canonical_level)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Boxes (N, 4) of each image, in its pixels, to (sum of N, C, size, size)."""
        maps = [x[name] for name in self.featmap_names]
        images = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
        regions = torch.cat([torch.cat(images), torch.cat(boxes)], dim=1)
        levels = self.level_of(boxes)
        # Numbers of the right shape, all of them replaced. Zeros of a shape OpenVINO does not convert.
        pooled = regions[:, :1, None, None].to(maps[0]).expand(-1, maps[0].shape[1], *self.output_size)
        for level, (features, stride) in enumerate(zip(maps, STRIDES, strict=True)):
            chosen = torch.where(levels == level)[0]
            taken = roi_align(features, regions[chosen].to(features), self.output_size, 1 / stride, aligned=True)
            pooled = pooled.index_copy(0, chosen, taken.to(pooled.dtype))
        return pooled


class StripTransform(GeneralizedRCNNTransform):
    """torchvision's preparation of images, also of those so long that their short side would come to no pixel."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        size = (image.shape[1], image.shape[2])
        least = max(size) // self.max_size + 1
        if min(size) >= least:
            return super().resize(image, target)
        wider = [max(side, least) for side in size]
        if target is not None:
            target = {**target, "boxes": resize_boxes(target["boxes"], list(size), wider)}
            if "masks" in target:
                target["masks"] = F.interpolate(target["masks"][:, None].float(), wider)[:, 0].byte()
        return super().resize(F.interpolate(image[None], wider, mode="bilinear", align_corners=False)[0], target)


Detector = TypeVar("Detector", bound=FasterRCNN)


def take_strips(model: Detector) -> Detector:
    """The detector, with :class:`StripTransform` in its own's place."""
    own: Any = model.transform
    model.transform = StripTransform(own.min_size, own.max_size, own.image_mean, own.image_std)
    return model


def make_settings(  # noqa: PLR0913 - public keywords
    backbone: str,
    *,
    num_classes: int,
    pretrained: bool = False,
    drop_path: float | None = None,
    min_size: int | tuple[int, ...] = 800,
    max_size: int = 1333,
    hidden_channels: int = 256,
    proposals: int = 1000,
    regions: int = 512,
    in_chans: int = 3,
    **options: Any,
) -> dict[str, Any]:
    """What all detectors have in common, as arguments of torchvision's ``FasterRCNN``.

    Args:
        backbone: name of the backbone, any that timm knows.
        num_classes: of the objects; label 0 is the background, theirs begin at 1.
        pretrained: load the backbone's ImageNet weights.
        drop_path: rate of stochastic depth.
        min_size: what the short side of an image is brought to; of several, one drawn for each image in training, and
            the last in evaluation.
        max_size: what its long side may be at most.
        hidden_channels: of the pyramid and of the heads' convolutions, less than the paper's 256 for small data.
        proposals: regions of an image that the heads look at; most of the heads' cost.
        regions: those of them that they learn from.
        in_chans: channels of the images; others than colours are normalised by the average of the three.
        options: further arguments of the backbone.

    Raises:
        ValueError: for a backbone without four features at strides 4, 8, 16 and 32, or fewer than one class.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1 (the background is added), got {num_classes}")
    features = make_features(
        backbone, pretrained=pretrained, overview=True, drop_path=drop_path, in_chans=in_chans, **options
    )
    if features.strides != STRIDES:
        raise ValueError(
            f"a detector's anchors need features at strides {STRIDES}, got {features.strides};"
            " leave out stem_stride and output_stride"
        )
    return dict(
        backbone=PyramidBackbone(features.module, features.channels, hidden_channels),
        num_classes=num_classes + 1,
        min_size=min_size,
        max_size=max_size,
        **_make_normalisation(in_chans),
        rpn_anchor_generator=ExactAnchors(),
        rpn_post_nms_top_n_train=proposals,
        rpn_post_nms_top_n_test=proposals,
        box_batch_size_per_image=regions,
        box_roi_pool=AlignedRoIAlign(7),
    )


def _make_normalisation(in_chans: int) -> dict[str, Sequence[float]]:
    """Mean and deviation of each channel."""
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if in_chans == len(mean):
        return dict(image_mean=mean, image_std=std)
    return dict(image_mean=(sum(mean) / len(mean),) * in_chans, image_std=(sum(std) / len(std),) * in_chans)


def faster_rcnn(backbone: str = "overlock_t", *, num_classes: int, **options: Any) -> FasterRCNN:
    """Faster R-CNN, torchvision's model; further arguments and errors are those of :func:`make_settings`."""
    return take_strips(FasterRCNN(**make_settings(backbone, num_classes=num_classes, **options)))


def mask_rcnn(backbone: str = "overlock_t", *, num_classes: int, **options: Any) -> MaskRCNN:
    """Mask R-CNN, torchvision's model; further arguments and errors are those of :func:`make_settings`."""
    settings = make_settings(backbone, num_classes=num_classes, **options)
    classes = settings.pop("num_classes")
    parts = make_mask_parts(settings["backbone"].out_channels, classes)
    return take_strips(MaskRCNN(box_predictor=FastRCNNPredictor(1024, classes), **parts, **settings))


def make_mask_parts(width: int, classes: int) -> dict[str, nn.Module]:
    """What finds masks, as arguments of torchvision's heads: regions of 14 x 14, four convolutions, masks of 28 x 28.

    Args:
        width: channels of the pyramid's maps and of the convolutions.
        classes: with the background.
    """
    return dict(
        mask_roi_pool=AlignedRoIAlign(14),
        mask_head=MaskRCNNHeads(width, (width,) * 4, dilation=1),
        mask_predictor=MaskRCNNPredictor(width, width, classes),
    )


def check_limits(threshold: float, max_detections: int | None = None, nms_iou: float | None = None) -> None:
    """Raise ValueError for limits that :func:`find_objects` cannot keep to."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in 0 to 1, got {threshold}")
    if max_detections is not None and max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}")
    if nms_iou is not None and not 0 < nms_iou <= 1:
        raise ValueError(f"nms_iou must be above 0 and up to 1, got {nms_iou}")


@torch.no_grad()
def find_objects(
    network: nn.Module,
    images: Sequence[Tensor],
    *,
    threshold: float | None = None,
    max_detections: int | None = None,
    nms_iou: float | None = None,
    strict: bool = False,
) -> list[dict[str, Any]]:
    """The objects in images, the surest first.

    As the network itself, in evaluation, but for the masks, which are pasted into the image one at a time and kept as
    run lengths: those of a hundred objects in a large photograph would take gigabytes.

    Args:
        network: a detector, put into evaluation mode.
        images: (3, H, W) each, of 0 to 1, of any sizes.
        threshold: score from which on an object counts; the network's own 0.05 unless given.
        max_detections: objects of an image, the surest; the network's own 100 unless given.
        nms_iou: overlap from which on, of two boxes of one class, the less sure one is left out; the network's own 0.5
            unless given.
        strict: raise an error where the network's features are no finite numbers; else nothing is found.

    Returns:
        For each image, on the CPU, boxes (N, 4) as left, top, right, bottom in its pixels, labels (N,) from 1 on,
        scores (N,), and masks, a :class:`overlock.data.run_lengths.Masks`, from detectors that have some.

    Raises:
        ValueError: for a limit that will not do.
        FloatingPointError: see ``strict``.
    """
    check_limits(0 if threshold is None else threshold, max_detections, nms_iou)
    model: Any = network.eval()
    # torchvision's heads take what is above their threshold, in float32.
    below = None if threshold is None else float(np.nextafter(np.float32(threshold), np.float32(-1)))
    limits = dict(score_thresh=below, detections_per_img=max_detections, nms_thresh=nms_iou)
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    prepared, _ = model.transform(list(images))
    features = model.backbone(prepared.tensors)
    if strict and not all(bool(one.isfinite().all()) for one in features.values()):
        raise FloatingPointError("the network's features are no finite numbers")
    proposals, _ = model.rpn(prepared, features)
    heads = _limited(model.roi_heads, {name: value for name, value in limits.items() if value is not None})
    found, _ = heads(features, proposals, prepared.image_sizes)
    return [as_result(one, given, size) for one, given, size in zip(found, prepared.image_sizes, sizes, strict=True)]


def _limited(heads: nn.Module, limits: dict[str, float]) -> nn.Module:
    """The heads with other limits, of the same layers; those of other threads stay as they are."""
    if not limits:
        return heads
    copied = copy.copy(heads)
    copied.__dict__.update(limits)
    stages = getattr(heads, "stages", None)
    if stages is not None:  # of a cascade, whose last stage chooses
        copied._modules = {**heads._modules, "stages": nn.ModuleList([*stages[:-1], _limited(stages[-1], limits)])}
    return copied


def as_result(found: dict[str, Tensor], given: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    """Objects of an image of the network's size in pixels of the image itself."""
    result: dict[str, Any] = {name: found[name].cpu() for name in ("labels", "scores")}
    result["boxes"] = resize_boxes(found["boxes"], list(given), list(size)).float().cpu()
    if "masks" in found:
        result["masks"] = paste(found["masks"].cpu(), result["boxes"], size)
    return result
