"""The task: loss, metric, optimiser and schedule of a classifier."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from overlock.training.config import TrainConfig

WARMUP_START, FINAL_LR = 1e-3, 1e-2  # as shares of the peak, the paper's 1e-6 and 1e-5 of 1e-3


class Classifier(LightningModule):
    """A network and how it learns to classify.

    Args:
        network: images (B, Cin, H, W) to logits (B, classes), or in training to the main and the auxiliary logits.
        config: the run's.
        num_classes: of the logits.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, num_classes: int):
        super().__init__()
        self.network = network
        self.config = config
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        outputs = self.network(images)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = self._loss(logits, labels)
        for other in auxiliary:
            loss = loss + self.config.aux_weight * self._loss(other, labels)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        self.accuracy(self.network(images), labels)
        self.log("accuracy", self.accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> dict[str, Any]:
        config = self.config
        optimizer = create_optimizer_v2(self.network, opt="adamw", lr=config.lr, weight_decay=config.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(steps * min(config.warmup_epochs / config.epochs, 0.5))
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=steps - warmup,
            lr_min=config.lr * FINAL_LR,
            warmup_t=warmup,
            warmup_lr_init=config.lr * WARMUP_START,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        scheduler.step_update(0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: CosineLRScheduler, _: Any) -> None:  # type: ignore[override]
        """timm's schedulers count steps themselves."""
        scheduler.step_update(self.global_step)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """What prediction needs: all but the auxiliary head."""
        return {name: t for name, t in self.network.state_dict().items() if not name.startswith("aux_head.")}
