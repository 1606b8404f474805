"""What classification is made of: the loss on mixed images, and the measures of a test."""

from __future__ import annotations

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.data.loaders import Batch
from overlock.training.config import LossConfig


class Classification:
    """Loss and measures of a classifier.

    Args:
        config: of the loss.
        num_classes: of the logits.
    """

    main_measure = "top1"
    """The measure that tells the best weights: the higher the better."""

    def __init__(self, config: LossConfig, num_classes: int):
        self.config = config
        self.num_classes = num_classes
        self.mix = (
            Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mix_prob,
                switch_prob=config.switch_prob,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )
            if config.mixes
            else None
        )

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy of the main head and, weighted, of the auxiliary one: a scalar with a gradient.

        Where mixing is on, images and labels are mixed first, by numpy's global generator, and the labels are shares
        of the classes; smoothing is part of those.
        """
        images, labels = batch.images, batch.labels
        smoothing = self.config.label_smoothing
        if self.mix is not None:
            images, labels = self.mix(images, labels)
            smoothing = 0.0
        outputs = network(images)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        for other in auxiliary:
            loss = loss + self.config.aux_weight * F.cross_entropy(other.float(), labels, label_smoothing=smoothing)
        return loss

    def test(self, network: nn.Module, batch: Batch) -> Tensor:
        """Sums over a batch: images, of which right, of which right within the best five, loss; (4,)."""
        logits = network(batch.images).float()
        best = logits.topk(min(5, self.num_classes), dim=1).indices == batch.labels[:, None]
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        return torch.stack([loss.new_tensor(len(best)), best[:, 0].sum(), best.sum(), loss])

    def measures(self, sums: Tensor) -> dict[str, float]:
        """Shares of 0 to 1 and the mean loss, from the sums of :meth:`test`."""
        count, top1, top5, loss = sums.tolist()
        if count == 0:
            raise ValueError("none of the images to test on could be read")
        return dict(top1=top1 / count, top5=top5 / count, test_loss=loss / count)
