"""Recipes: functions that return the full configuration of a run; a variation states only the difference.

The ImageNet ones are section 4.1 of the paper; what it leaves open is as in the authors' released settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from overlock.data.augmentation import Augmentation
from overlock.training.config import EmaConfig, LossConfig, OptimConfig, RunConfig, RuntimeConfig, TrainConfig
from overlock.training.detection_config import DetectConfig
from overlock.training.detection_recipes import DETECTION_RECIPES
from overlock.training.segmentation_config import SegmentConfig
from overlock.training.segmentation_recipes import SEGMENTATION_RECIPES

Recipe = Callable[[str], RunConfig]
CONFIGS: dict[str, type[RunConfig]] = dict(classify=TrainConfig, detect=DetectConfig, segment=SegmentConfig)
"""By the task."""


def imagenet_xt(data: str) -> TrainConfig:
    """OverLoCK-XT on ImageNet-1K for 300 epochs, 82.7 % in the paper."""
    return TrainConfig(
        data=data,
        output="runs/imagenet_xt",
        model="overlock_xt",
        epochs=300,
        batch_size=2048,
        augment=Augmentation(rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, erasing=0.25),
        loss=LossConfig(label_smoothing=0.1, aux_weight=0.4, mixup=0.8, cutmix=1.0, switch_prob=0.5),
        optim=OptimConfig(
            lr=1e-3,
            base_batch_size=1024,
            weight_decay=0.05,
            clip_norm=5.0,
            warmup_epochs=5,
            warmup_lr=1e-6,
            min_lr=1e-5,
        ),
        ema=EmaConfig(decay=0.9999),
        runtime=RuntimeConfig(precision="bf16", micro_batch=256, workers=8),
    )


def imagenet_t(data: str) -> TrainConfig:
    """OverLoCK-T on ImageNet-1K for 300 epochs, 84.2 % in the paper."""
    return replace(imagenet_xt(data), output="runs/imagenet_t", model="overlock_t")


def imagenet_s(data: str) -> TrainConfig:
    """OverLoCK-S on ImageNet-1K for 300 epochs, 84.8 % in the paper."""
    return replace(imagenet_xt(data), output="runs/imagenet_s", model="overlock_s")


def imagenet_b(data: str) -> TrainConfig:
    """OverLoCK-B on ImageNet-1K for 300 epochs, 85.1 % in the paper."""
    return replace(imagenet_xt(data), output="runs/imagenet_b", model="overlock_b")


def ablation(data: str) -> TrainConfig:
    """The schedule of the ablations, Tables 6 and 7: XT on ImageNet-1K for 120 epochs."""
    return replace(imagenet_xt(data), output="runs/ablation", epochs=120)


def ablation_small(data: str) -> TrainConfig:
    """The ablations for small budgets: networks of a million parameters on images of 64 x 64 pixels, say CIFAR-10."""
    return TrainConfig(
        data=data,
        output="runs/ablation_small",
        model="overlock_roadmap_gate",
        model_args=dict(size="small"),
        image_size=64,
        stem_stride=2,
        epochs=30,
        batch_size=128,
        drop_path=0.05,
        validate_every=5,
        augment=Augmentation(padding=8),
        optim=OptimConfig(lr=2e-3, base_batch_size=128, warmup_epochs=2),
        ema=EmaConfig(decay=0.999, warmup=True),
        runtime=RuntimeConfig(channels_last=True),
    )


def finetune(data: str) -> TrainConfig:
    """Published weights fine-tuned to new classes; give --weights FILE, or --pretrained true to download them."""
    return TrainConfig(
        data=data,
        output="runs/finetune",
        epochs=30,
        batch_size=64,
        augment=Augmentation(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.1, scale=(0.3, 1.0)),
        optim=OptimConfig(lr=2e-4, base_batch_size=64, layer_decay=0.85, warmup_epochs=2, min_lr=1e-6),
        ema=EmaConfig(decay=0.9998, warmup=True),
    )


def small(data: str) -> TrainConfig:
    """A small network from scratch on some thousands of images of one's own."""
    return TrainConfig(
        data=data,
        output="runs/small",
        model="overlock_nano",
        epochs=100,
        batch_size=64,
        augment=Augmentation(rand_augment="rand-m7-mstd0.5-inc1", erasing=0.1, scale=(0.25, 1.0)),
        loss=LossConfig(mixup=0.2, cutmix=1.0, mix_prob=0.5),
        optim=OptimConfig(lr=1e-3, base_batch_size=64),
        ema=EmaConfig(decay=0.9998, warmup=True),
    )


def cifar10(data: str) -> TrainConfig:
    """The smallest network from scratch on CIFAR-10, of 32 x 32 pixels: the model that comes with the package."""
    return TrainConfig(
        data=data,
        output="runs/cifar10",
        model="overlock_atto",
        image_size=32,
        stem_stride=1,
        epochs=15,
        batch_size=128,
        validate_every=2,
        augment=Augmentation(padding=4),
        # Orthogonal updates come further in so few epochs than AdamW's.
        optim=OptimConfig(name="nmuon", lr=3e-3, base_batch_size=128, warmup_epochs=1),
        ema=EmaConfig(decay=0.999, warmup=True),
        runtime=RuntimeConfig(channels_last=True),
    )


def cifar10_mixed(data: str) -> TrainConfig:
    """Further on CIFAR-10 from the weights of the recipe cifar10, with images altered and, half of the time, mixed."""
    first = cifar10(data)
    return replace(
        first,
        output="runs/cifar10_mixed",
        weights=first.output,
        epochs=9,
        augment=replace(first.augment, rand_augment="rand-m5-mstd0.5-inc1"),
        loss=LossConfig(cutmix=1.0, mix_prob=0.5),
        optim=replace(first.optim, lr=1.5e-3),
    )


def digits(data: str = "digits") -> TrainConfig:
    """The smallest network on scikit-learn's handwritten digits: two minutes on two cores, to see it all work."""
    return TrainConfig(
        data=data,
        output="runs/digits",
        model="overlock_atto",
        image_size=32,
        in_chans=1,
        stem_stride=2,
        epochs=6,
        batch_size=32,
        augment=Augmentation(scale=(0.6, 1.0), ratio=(0.8, 1.25)),
        optim=OptimConfig(lr=3e-3, base_batch_size=32, warmup_epochs=1, warmup_lr=3e-6, min_lr=3e-5),
        runtime=RuntimeConfig(workers=0),
    )


RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        *(
            imagenet_xt,
            imagenet_t,
            imagenet_s,
            imagenet_b,
            ablation,
            ablation_small,
            finetune,
            small,
            cifar10,
            cifar10_mixed,
            digits,
        ),
        *DETECTION_RECIPES,
        *SEGMENTATION_RECIPES,
    )
}
"""Recipes by name: what ``overlock train NAME`` begins with, as functions that give the settings."""
