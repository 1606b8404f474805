"""The classifier on Focus-Net's features and the auxiliary one on the overview."""

from __future__ import annotations

from collections import OrderedDict

from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from overlock.layers import BatchNorm2d, ConvNorm
from overlock.layers.arguments import check_count, check_rate
from overlock.layers.conv_norm import fold_norm_into_next

POOLINGS = ("avg", "max", "avgmax", "fast", "fastavg", "fastmax", "fastavgmax", "")
"""timm's kinds of pooling that keep the width; the last is none."""


def _make_pool(global_pool: str) -> SelectAdaptivePool2d:
    if global_pool not in POOLINGS:
        raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLINGS))}; got {global_pool!r}")
    return SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))


def _make_classifier(in_features: int, num_classes: int, pooled: bool) -> nn.Module:
    check_count("num_classes", num_classes, least=0)
    if num_classes == 0:
        return nn.Identity()
    return nn.Linear(in_features, num_classes) if pooled else nn.Conv2d(in_features, num_classes, kernel_size=1)


class ClassifierHead(nn.Module):
    """1x1 convolution to a wide hidden layer, batch norm, SiLU, pool, classifier.

    (B, C, H, W) -> (B, num_classes); without pooling (``global_pool=""``) (B, num_classes, H, W).
    """

    def __init__(self, in_features: int, hidden_size: int, num_classes: int, *, global_pool: str, drop_rate: float):
        super().__init__()
        self.num_features = hidden_size
        self.hidden = nn.Sequential(
            OrderedDict(
                proj=ConvNorm(nn.Conv2d(in_features, hidden_size, kernel_size=1, bias=False), hidden_size),
                act=nn.SiLU(),
            )
        )
        self.global_pool = _make_pool(global_pool)
        check_rate("drop_rate", drop_rate)
        self.drop = nn.Dropout(drop_rate)
        self.fc = _make_classifier(hidden_size, num_classes, bool(global_pool))

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling where one is named."""
        check_count("num_classes", num_classes, least=0)
        if global_pool is not None:
            self.global_pool = _make_pool(global_pool)
        self.fc = _make_classifier(self.num_features, num_classes, not self.global_pool.is_identity())

    def prune(self, in_features: int) -> None:
        """Leave nothing but a place for a pooling and a classifier of the features themselves."""
        self.hidden, self.num_features = nn.Identity(), in_features  # type: ignore[assignment]
        self.reset(0, "")

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.global_pool(self.hidden(x)))
        return x if pre_logits else self.fc(x)


class AuxiliaryHead(nn.Module):
    """Batch norm, average pool, classifier on the overview, in training only. (B, C, H, W) -> (B, num_classes)."""

    def __init__(self, in_features: int, num_classes: int):
        super().__init__()
        self.norm: nn.Module = BatchNorm2d(in_features)
        self.global_pool = SelectAdaptivePool2d(pool_type="avg", flatten=True)
        self.fc = nn.Linear(in_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.global_pool(self.norm(x)))

    def fold(self) -> AuxiliaryHead:
        if isinstance(self.norm, BatchNorm2d):
            fold_norm_into_next(self.norm, self.fc)
            self.norm = nn.Identity()
        return self
