"""The authors' files of detectors and segmenters: names of MMDetection and MMSegmentation to ours.

Three things are converted besides names. Their background is the last class, torchvision's the first. Their boxes are
predicted for the objects alone, torchvision's for the background too, which is never read. So are their masks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from overlock.tasks.pyramid import Pyramid
from overlock.weights import describe_misfits, load_translated, translate, unwrap

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
_RULES = [
    *_DETECTOR,
    *((f"roi_head.{theirs}", f"roi_heads.{ours}") for theirs, ours in (*_ONE_STAGE, *_STAGE)),
    *_SEGMENTER,
]


def _background_first(x: Tensor) -> Tensor:
    return torch.cat([x[-1:], x[:-1]])


def _with_room(rows: int) -> Callable[[Tensor], Tensor]:
    """A change that puts rows of zeros for the background before those of the objects."""
    return lambda x: torch.cat([x.new_zeros(rows, *x.shape[1:]), x])


_CHANGES = {"fc_cls": _background_first, "fc_reg": _with_room(4), "conv_logits": _with_room(1)}
_COMPILED = [(re.compile(re.escape(theirs).replace(r"\{i\}", r"(\d+)") + r"\.(\w+)$"), ours) for theirs, ours in _RULES]


def find_head(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """The head whose weights these are, in the authors' names, and the count of its classes; None for other weights.

    Args:
        state: names and weights.
    """
    if "decode_head.conv_seg.weight" in state:
        return "upernet", len(state["decode_head.conv_seg.weight"])
    masks = any(name.startswith("roi_head.mask_head.") for name in state)
    for stage, heads in ((".0", ("cascade_rcnn", "cascade_mask_rcnn")), ("", ("faster_rcnn", "mask_rcnn"))):
        classifier = state.get(f"roi_head.bbox_head{stage}.fc_cls.weight")
        if classifier is not None:
            return heads[masks], len(classifier) - 1  # without the background
    return None


def translate_dense(checkpoint: Mapping[str, object], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of the authors in the names and shapes of a detector or segmenter of ours.

    Args:
        checkpoint: as the authors save it.
        model: made by a builder of ``overlock.detection`` or ``overlock.segmentation`` on a backbone of ours.

    Raises:
        ValueError: naming the first names that are missing, left over, or of another shape.
    """
    state, target = unwrap(checkpoint), model.state_dict()
    root, pyramid = _find_pyramid(model)
    translated = {f"{root}.{name}": t for name, t in translate(state, pyramid).items()}
    left_over = []
    for name, tensor in state.items():
        if name.startswith("backbone."):
            continue
        ours = _our_name(name)
        if ours not in target:
            left_over.append(name)
            continue
        change = _CHANGES.get(name.split(".")[-2])
        translated[ours] = tensor if change is None else change(tensor)
    missing = [name for name in target if name not in translated and not name.startswith("auxiliary_head.")]
    other = [
        f"{name} {tuple(t.shape)} where the model has {tuple(target[name].shape)}"
        for name, t in translated.items()
        if name in target and t.shape != target[name].shape
    ]
    if missing or left_over or other:
        raise ValueError(describe_misfits(missing, left_over, other))
    return translated


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the authors' file of a detector or segmenter.

    Raises:
        ValueError: for an unreadable file, or one that does not fit; then the model is as it was.
    """
    load_translated(model, path, translate_dense)


def _our_name(name: str) -> str | None:
    for pattern, ours in _COMPILED:
        match = pattern.match(name)
        if match:
            *numbers, leaf = match.groups()
            return ours.replace("{i}", "%s") % tuple(numbers) + f".{leaf}"
    return None


def _find_pyramid(model: nn.Module) -> tuple[str, Pyramid]:
    for name, module in model.named_modules():
        if isinstance(module, Pyramid):
            return name, module
    raise ValueError("the authors' dense weights are those of OverLoCK's backbones; this model has another one")
