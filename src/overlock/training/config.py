"""The settings of a training run: the one source of the command's options, of their help, and of the saved file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LIMITS = dict(epochs=1, batch_size=1, image_size=8, lr=0, weight_decay=0, warmup_epochs=0, workers=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a classifier is trained. Raises ValueError for values that cannot be."""

    data: str
    """Folder of images by class (with train and val below it, or split here), or 'digits' for scikit-learn's."""
    output: str = "runs/train"
    """Folder for the results; must be new or empty."""
    model: str = "overlock_xt"
    """Any model of timm's, ours among them: overlock_atto, _nano, _xt, _t, _s, _b."""
    pretrained: bool = False
    """Start from published weights, downloaded by timm."""
    weights: str | None = None
    """Start from a file of OverLoCK weights, the authors' or one of ours; a classifier of other classes starts anew."""
    image_size: int = 224
    """Side of the images in pixels."""
    in_chans: Literal[1, 3] = 3
    """Channels of the images: 3, or 1 for grey."""
    stem_stride: Literal[1, 2, 4] | None = None
    """Stride of OverLoCK's stem: 4 unless given; 2 or 1 for images of few pixels."""
    augmentation: Literal["none", "light", "strong"] = "light"
    """Random changes to training images: none; light (crops); strong (also RandAugment and erasing, the paper's)."""
    mirror: bool | None = None
    """Mirror training images at random: yes unless given, but not digits."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 64
    """Images a step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Weight decay, none on biases, norms and other 1-D parameters."""
    warmup_epochs: float = 1.0
    """Length of the linear warm-up, at most half of the epochs; a cosine to zero follows."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    aux_weight: float = 0.4
    """Weight of the loss on OverLoCK's auxiliary head."""
    workers: int = 2
    """Processes that load images; 0 loads them in the training process."""
    seed: int = 0
    """Of the split, the initial weights, the order and the augmentation."""

    def __post_init__(self) -> None:
        for name, least in LIMITS.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "warmup_epochs", "label_smoothing", "aux_weight"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        if self.lr == 0:
            raise ValueError("lr must be above 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.pretrained and self.weights:
            raise ValueError("give either pretrained or weights, not both")
        if self.stem_stride is not None and not self.model.startswith("overlock_"):
            raise ValueError(f"stem_stride is an option of OverLoCK; leave it out for {self.model}")
