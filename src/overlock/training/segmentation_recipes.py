"""Recipes of segmenters: section 4.3 of the paper, and a small one; see :mod:`overlock.training.detection_recipes`."""

from __future__ import annotations

from dataclasses import replace

from overlock.training.config import EmaConfig, OptimConfig, RuntimeConfig
from overlock.training.segmentation_config import SegmentConfig


def upernet_t(data: str) -> SegmentConfig:
    """UperNet with T on ADE20K for 160 000 steps, mIoU 50.3 in the paper."""
    return SegmentConfig(
        data=data,
        output="runs/upernet_t",
        model="overlock_t",
        reduce_zero_label=True,
        drop_path=0.2,
        epochs=10,
        epoch_steps=16_000,
        batch_size=16,
        optim=OptimConfig(
            lr=6e-5, base_batch_size=16, weight_decay=0.01, clip_norm=0, schedule="linear", warmup_steps=1500,
            warmup_lr=6e-11, min_lr=0,
        ),
        runtime=RuntimeConfig(precision="bf16", micro_batch=2, workers=4),
    )  # fmt: skip


def upernet_s(data: str) -> SegmentConfig:
    """UperNet with S on ADE20K for 160 000 steps, mIoU 51.3 in the paper."""
    return replace(upernet_t(data), output="runs/upernet_s", model="overlock_s", drop_path=0.3)


def upernet_b(data: str) -> SegmentConfig:
    """UperNet with B on ADE20K for 160 000 steps, mIoU 51.7 in the paper."""
    return replace(upernet_t(data), output="runs/upernet_b", model="overlock_b", drop_path=0.5)


def small_segment(data: str) -> SegmentConfig:
    """A small segmenter from scratch on some hundreds of images of one's own."""
    return SegmentConfig(
        data=data,
        output="runs/small_segment",
        model="overlock_nano",
        hidden_channels=64,
        scale=(480, 360),
        ratio=(0.75, 1.5),
        crop=256,
        epochs=25,
        batch_size=8,
        validate_every=5,
        optim=OptimConfig(lr=1e-3, base_batch_size=8, warmup_epochs=2),
        ema=EmaConfig(decay=0.998, warmup=True),
    )


SEGMENTATION_RECIPES = (upernet_t, upernet_s, upernet_b, small_segment)
