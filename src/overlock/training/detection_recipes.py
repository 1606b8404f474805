"""Recipes of detectors: section 4.2 of the paper, and a small one.

The paper's start from ImageNet weights: give --weights FILE, or --pretrained true to download them. What the paper
leaves open is as in the authors' released settings, but for weight decay, which no bias has here.
"""

from __future__ import annotations

from dataclasses import replace

from overlock.training.config import EmaConfig, OptimConfig, RuntimeConfig
from overlock.training.detection_config import DetectConfig


def mask_rcnn_t_1x(data: str) -> DetectConfig:
    """Mask R-CNN with T on COCO for 12 epochs, box and mask AP 48.3 and 43.3 in the paper."""
    return DetectConfig(
        data=data,
        output="runs/mask_rcnn_t_1x",
        model="overlock_t",
        detector="mask_rcnn",
        drop_path=0.2,
        epochs=12,
        batch_size=16,
        optim=OptimConfig(
            lr=2e-4, base_batch_size=16, weight_decay=0.05, clip_norm=0, schedule="multistep", milestones=(8, 11),
            warmup_steps=500, warmup_lr=2e-7,
        ),
        runtime=RuntimeConfig(precision="bf16", micro_batch=2, workers=4),
    )  # fmt: skip


def mask_rcnn_s_1x(data: str) -> DetectConfig:
    """Mask R-CNN with S on COCO for 12 epochs, box and mask AP 49.4 and 44.0 in the paper."""
    return replace(mask_rcnn_t_1x(data), output="runs/mask_rcnn_s_1x", model="overlock_s", drop_path=0.4)


def mask_rcnn_b_1x(data: str) -> DetectConfig:
    """Mask R-CNN with B on COCO for 12 epochs, box and mask AP 49.9 and 44.4 in the paper."""
    return replace(mask_rcnn_t_1x(data), output="runs/mask_rcnn_b_1x", model="overlock_b", drop_path=0.6)


def mask_rcnn_t_3x(data: str) -> DetectConfig:
    """Mask R-CNN with T on COCO for 36 epochs at many scales, box and mask AP 49.6 and 43.9 in the paper."""
    short = mask_rcnn_t_1x(data)
    return replace(
        short,
        output="runs/mask_rcnn_t_3x",
        epochs=36,
        multi_scale=tuple(range(480, 801, 32)),
        optim=replace(short.optim, lr=1e-4, milestones=(27, 33), warmup_lr=1e-7),
    )


def mask_rcnn_s_3x(data: str) -> DetectConfig:
    """Mask R-CNN with S on COCO for 36 epochs at many scales, box and mask AP 51.0 and 45.0 in the paper."""
    return replace(mask_rcnn_t_3x(data), output="runs/mask_rcnn_s_3x", model="overlock_s", drop_path=0.4)


def mask_rcnn_b_3x(data: str) -> DetectConfig:
    """Mask R-CNN with B on COCO for 36 epochs at many scales, box and mask AP 51.4 and 45.3 in the paper."""
    return replace(mask_rcnn_t_3x(data), output="runs/mask_rcnn_b_3x", model="overlock_b", drop_path=0.6)


def cascade_t_3x(data: str) -> DetectConfig:
    """Cascade Mask R-CNN with T on COCO for 36 epochs, box and mask AP 52.4 and 45.4 in the paper."""
    return replace(mask_rcnn_t_3x(data), output="runs/cascade_t_3x", detector="cascade_mask_rcnn")


def cascade_s_3x(data: str) -> DetectConfig:
    """Cascade Mask R-CNN with S on COCO for 36 epochs, box and mask AP 53.6 and 46.4 in the paper."""
    return replace(mask_rcnn_s_3x(data), output="runs/cascade_s_3x", detector="cascade_mask_rcnn")


def cascade_b_3x(data: str) -> DetectConfig:
    """Cascade Mask R-CNN with B on COCO for 36 epochs, box and mask AP 53.9 and 46.8 in the paper."""
    return replace(mask_rcnn_b_3x(data), output="runs/cascade_b_3x", detector="cascade_mask_rcnn")


def small_detect(data: str) -> DetectConfig:
    """A small detector from scratch on some hundreds of images of one's own."""
    return DetectConfig(
        data=data,
        output="runs/small_detect",
        model="overlock_nano",
        detector="mask_rcnn",
        min_size=240,
        max_size=320,
        hidden_channels=64,
        proposals=100,
        regions=32,
        epochs=20,
        batch_size=4,
        validate_every=5,
        optim=OptimConfig(lr=5e-4, base_batch_size=4, warmup_steps=100, clip_norm=5),
        ema=EmaConfig(decay=0.998, warmup=True),
    )


DETECTION_RECIPES = (
    mask_rcnn_t_1x, mask_rcnn_s_1x, mask_rcnn_b_1x, mask_rcnn_t_3x, mask_rcnn_s_3x, mask_rcnn_b_3x,
    cascade_t_3x, cascade_s_3x, cascade_b_3x, small_detect,
)  # fmt: skip
