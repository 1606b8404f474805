"""What a person sees of a training run: a bar for the epoch at hand, a line for each one done."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class EpochProgress(Callback):
    """A bar over all steps on a terminal, and a line an epoch anywhere.

    Args:
        console: to write to.
    """

    def __init__(self, console: Console):
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.perf_counter()
        self.task = self.bar.add_task("training", total=int(trainer.estimated_stepping_batches))
        self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.bar.update(self.task, completed=trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.console.print(
            f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}"
            f"  loss {metrics['loss']:.3f}  test accuracy {100 * metrics['accuracy']:.2f} %"
            f"  {time.perf_counter() - self.started:.0f} s"
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.bar.stop()
