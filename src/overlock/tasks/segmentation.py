"""UperNet, with the heads of transformers (section 4.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from overlock.data.label_values import IGNORED
from overlock.extras import needing
from overlock.layers import BatchNorm2d
from overlock.tasks.features import make_features

AUXILIARY = 2  # the feature of stride 16


class UperNet(nn.Module):
    """A backbone, UperNet's head on its four features, and an auxiliary head on the third in training.

    Images (B, 3, H, W), normalised as the backbone's weights want them, to logits (B, classes, H, W); in training to
    those and the auxiliary head's.

    Args:
        features: the backbone, images to four features.
        channels: of the features.
        num_classes: of the pixels.
        hidden_channels: width of the head.
        auxiliary_channels: width of the auxiliary head.
        drop_rate: share of whole channels that both heads drop before they classify, in training.
    """

    def __init__(
        self,
        features: nn.Module,
        channels: tuple[int, ...],
        *,
        num_classes: int,
        hidden_channels: int = 512,
        auxiliary_channels: int = 256,
        drop_rate: float = 0.1,
    ):
        super().__init__()
        config, decoder, auxiliary = _heads()
        settings = config(
            hidden_size=hidden_channels, auxiliary_channels=auxiliary_channels, num_labels=num_classes
        )  # fmt: skip
        self.backbone = features
        self.decode_head = decoder(settings, in_channels=list(channels))
        self.auxiliary_head = auxiliary(settings, in_channels=list(channels), in_index=AUXILIARY)
        for head in (self.decode_head, self.auxiliary_head):
            head.classifier = nn.Sequential(nn.Dropout2d(drop_rate), head.classifier)
            _let_train_on_one_image(head)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.backbone(x)
        logits = _enlarge(self.decode_head(features), x)
        if not self.training:
            return logits
        return logits, _enlarge(self.auxiliary_head(features), x)


def _let_train_on_one_image(head: nn.Module) -> None:
    """Norms of our own, since the head pools maps to one pixel, which in a single image leaves no variance."""
    for module in head.modules():
        norm = getattr(module, "batch_norm", None)
        if isinstance(norm, nn.BatchNorm2d):
            module.batch_norm = BatchNorm2d(norm.num_features)


def _enlarge(logits: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)


def _heads() -> tuple[Any, Any, Any]:
    with needing("UperNet needs transformers", "segment"):
        from transformers import UperNetConfig  # noqa: PLC0415
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead  # noqa: PLC0415
    return UperNetConfig, UperNetHead, UperNetFCNHead


def upernet(
    backbone: str = "overlock_t",
    *,
    num_classes: int,
    pretrained: bool = False,
    drop_path: float | None = None,
    hidden_channels: int = 512,
    **options: Any,
) -> UperNet:
    """UperNet as in the paper, on any backbone that timm knows.

    Args:
        backbone: name of the backbone.
        num_classes: of the pixels.
        pretrained: load the backbone's ImageNet weights.
        drop_path: rate of stochastic depth.
        hidden_channels: width of the head, less than the paper's 512 for small data.
        options: further arguments of the backbone.

    Raises:
        ValueError: for a backbone without four features, or fewer than two classes.
        ImportError: without transformers.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    features = make_features(backbone, pretrained=pretrained, drop_path=drop_path, **options)
    return UperNet(features.module, features.channels, num_classes=num_classes, hidden_channels=hidden_channels)


def segmentation_loss(
    outputs: Tensor | tuple[Tensor, Tensor],
    labels: Tensor,
    *,
    auxiliary_weight: float = 0.4,
    ignore_index: int = IGNORED,
) -> Tensor:
    """Cross entropy of the logits, and of the auxiliary ones with a weight; 0 where every pixel is ignored.

    Args:
        outputs: of :class:`UperNet`, (B, classes, H, W) each.
        labels: (B, H, W).
        auxiliary_weight: of the auxiliary head's loss.
        ignore_index: label of pixels that do not count.
    """
    counted = (labels != ignore_index).sum().clamp(min=1)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum") / counted

    if isinstance(outputs, Tensor):
        return loss(outputs)
    main, auxiliary = outputs
    return loss(main) + auxiliary_weight * loss(auxiliary)


__all__ = ["UperNet", "segmentation_loss", "upernet"]
