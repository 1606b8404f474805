"""Heads of detectors and segmenters: which one a state dict has, and MMDetection's and MMSegmentation's names to ours.

Three things are converted besides names. Their background is the last class, torchvision's the first. Their boxes are
predicted for the objects alone, torchvision's for the background too, which is never read. So are their masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from overlock.weights.names import NameTable

# Their modules and ours; {i} is a number. The first of a cascade is its stage's.
_DETECTOR = [
    ("neck.lateral_convs.{i}.conv", "backbone.fpn.inner_blocks.{i}.0"),
    ("neck.fpn_convs.{i}.conv", "backbone.fpn.layer_blocks.{i}.0"),
    ("rpn_head.rpn_conv", "rpn.head.conv.0.0"),
    ("rpn_head.rpn_cls", "rpn.head.cls_logits"),
    ("rpn_head.rpn_reg", "rpn.head.bbox_pred"),
]
_ONE_STAGE = [
    ("bbox_head.shared_fcs.0", "box_head.fc6"),
    ("bbox_head.shared_fcs.1", "box_head.fc7"),
    ("bbox_head.fc_cls", "box_predictor.cls_score"),
    ("bbox_head.fc_reg", "box_predictor.bbox_pred"),
    ("mask_head.convs.{i}.conv", "mask_head.{i}.0"),
    ("mask_head.upsample", "mask_predictor.conv5_mask"),
    ("mask_head.conv_logits", "mask_predictor.mask_fcn_logits"),
]
_STAGE = [
    ("bbox_head.{i}.shared_convs.{i}.conv", "stages.{i}.box_head.{i}.0"),
    ("bbox_head.{i}.shared_convs.{i}.bn", "stages.{i}.box_head.{i}.1"),
    ("bbox_head.{i}.shared_fcs.0", "stages.{i}.box_head.5"),
    ("bbox_head.{i}.fc_cls", "stages.{i}.box_predictor.cls_score"),
    ("bbox_head.{i}.fc_reg", "stages.{i}.box_predictor.bbox_pred"),
    ("mask_head.{i}.convs.{i}.conv", "stages.{i}.mask_head.{i}.0"),
    ("mask_head.{i}.upsample", "stages.{i}.mask_predictor.conv5_mask"),
    ("mask_head.{i}.conv_logits", "stages.{i}.mask_predictor.mask_fcn_logits"),
]
_SEGMENTER = [
    *(
        (f"{theirs}.{part}", f"{ours}.{other}")
        for part, other in (("conv", "conv"), ("bn", "batch_norm"))
        for theirs, ours in (
            ("decode_head.psp_modules.{i}.1", "decode_head.psp_modules.{i}.1"),
            ("decode_head.bottleneck", "decode_head.bottleneck"),
            ("decode_head.lateral_convs.{i}", "decode_head.lateral_convs.{i}"),
            ("decode_head.fpn_convs.{i}", "decode_head.fpn_convs.{i}"),
            ("decode_head.fpn_bottleneck", "decode_head.fpn_bottleneck"),
            ("auxiliary_head.convs.{i}", "auxiliary_head.convs.{i}"),
        )
    ),
    ("decode_head.conv_seg", "decode_head.classifier.1"),
    ("auxiliary_head.conv_seg", "auxiliary_head.classifier.1"),
]
_THEIRS_FIRST = [
    *_DETECTOR,
    *((f"roi_head.{theirs}", f"roi_heads.{ours}") for theirs, ours in (*_ONE_STAGE, *_STAGE)),
    *_SEGMENTER,
]


TABLE = NameTable([(ours, theirs) for theirs, ours in _THEIRS_FIRST])


def _background_first(x: Tensor) -> Tensor:
    return torch.cat([x[-1:], x[:-1]])


def _with_room(rows: int) -> Callable[[Tensor], Tensor]:
    """A change that puts rows of zeros for the background before those of the objects."""
    return lambda x: torch.cat([x.new_zeros(rows, *x.shape[1:]), x])


_CHANGES = {"fc_cls": _background_first, "fc_reg": _with_room(4), "conv_logits": _with_room(1)}


def heads_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' heads under our names and in our order of classes; names that are not theirs stay."""
    renamed = {}
    for name, tensor in state.items():
        ours = TABLE.ours(name)
        change = None if ours is None else _CHANGES.get(name.split(".")[-2])
        renamed[ours or name] = tensor if change is None else change(tensor)
    return renamed


@dataclass(frozen=True)
class Head:
    """What the names and shapes of a detector's or segmenter's head tell."""

    name: str
    """Of its builder: faster_rcnn, mask_rcnn, cascade_rcnn, cascade_mask_rcnn or upernet."""
    classes: int
    """Without a detector's background."""
    widths: dict[str, int]
    """Channels of its layers, by the builder's arguments."""


_WIDTHS = dict(
    detector=dict(hidden_channels=("backbone.fpn.inner_blocks.0.0.weight", 0)),
    segmenter=dict(hidden_channels=("decode_head.bottleneck.conv.weight", 0)),
)
"""The tensors and axes that tell them."""


def find_head(state: Mapping[str, Tensor]) -> Head | None:
    """The head of a detector or segmenter whose weights these are; None for other weights.

    Args:
        state: names and tensors, ours or the authors'.
    """
    named = {TABLE.ours(name) or name: tensor for name, tensor in state.items()}
    masks = any(".mask_predictor." in name for name in named)
    for classifier, kind, background, name in (
        ("decode_head.classifier.1", "segmenter", 0, "upernet"),
        ("roi_heads.stages.0.box_predictor.cls_score", "detector", 1, "cascade_mask_rcnn" if masks else "cascade_rcnn"),
        ("roi_heads.box_predictor.cls_score", "detector", 1, "mask_rcnn" if masks else "faster_rcnn"),
    ):
        weight = named.get(f"{classifier}.weight")
        if weight is not None:
            told = {key: named[part].shape[axis] for key, (part, axis) in _WIDTHS[kind].items() if part in named}
            return Head(name, len(weight) - background, told)
    return None
