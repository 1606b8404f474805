"""The training loop on Lightning Fabric: steps that skip what is not finite, tests, and checkpoints between steps.

Fabric sees to devices, processes and precision. The loop itself is written out, rather than left to Lightning's
Trainer, since what a run must survive cuts across it: a step that is not finite is undone, the norms' statistics with
it; after too many of them the run goes back to a checkpoint and on from there with other random changes; it is saved
and stopped between any two steps and within a test; and a batch follows from the number of its step. In Trainer these
would be callbacks whose order among Trainer's own decides whether a resumed run is the same to the bit; here each is a
line.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning.fabric import Fabric
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from overlock.data.datasets import derive_seed
from overlock.data.loaders import WORKER_ERRORS, Batch, ImageLoader, TrainBatches, lost_worker
from overlock.settings import renew
from overlock.training.config import RunConfig
from overlock.training.reports import RunLog, Unreadable
from overlock.training.runtime import gathered
from overlock.training.state import CheckpointStore, Progress, check_archive
from overlock.training.stop import RunStoppedError, StopRequest

LOST = "repeat with --resume, and with fewer runtime.workers"
SYNC_EVERY = 10  # steps between the agreements of several processes to save or stop


class Metrics(Protocol):
    """What a test comes to."""

    def update(self, network: nn.Module, batch: Batch) -> None:
        """Pass a batch through the network, which is in evaluation mode, and count."""
        ...

    def measures(self, fabric: Fabric) -> dict[str, float]:
        """Of the batches of all processes."""
        ...


class Task(Protocol):
    """What is learnt: :class:`overlock.training.classification.Classification` for instance."""

    main_metric: str
    """The metric that tells the best weights: the higher the better."""

    @property
    def shares(self) -> Mapping[str, str]:
        """Measures of 0 to 1 that people look at, the main one first, and what they are called."""
        ...

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """A scalar with a gradient."""
        ...

    def make_metrics(self) -> Metrics:
        """Those of a test that begins."""
        ...


class DivergedError(Exception):
    """Too many steps in a row without a finite loss and gradient."""


class BufferGuard:
    """Keeps a network's buffers, the norms' statistics, so that a bad step's forward pass can be undone."""

    def __init__(self, network: nn.Module):
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in network.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self.groups = [(buffers, [b.clone() for b in buffers]) for buffers in by_type.values()]

    @torch.no_grad()
    def keep(self) -> None:
        for buffers, copies in self.groups:
            torch._foreach_copy_(copies, buffers)

    @torch.no_grad()
    def restore(self) -> None:
        for buffers, copies in self.groups:
            torch._foreach_copy_(buffers, copies)


@dataclasses.dataclass(kw_only=True)
class Trainer:
    """All that a run consists of; :meth:`fit` runs it to its end."""

    fabric: Fabric
    config: RunConfig
    task: Task
    network: nn.Module
    """As Fabric has set it up."""
    frozen: list[nn.Module]
    """Its modules that stay in evaluation mode."""
    optimizer: Optimizer
    schedule: Scheduler
    average: ModelEmaV3 | None
    batches: TrainBatches
    tests: ImageLoader
    store: CheckpointStore
    log: RunLog
    unreadable: Unreadable
    stop: StopRequest
    identity: dict[str, Any]
    """Of the run: its settings and data, kept in each checkpoint."""

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.guard = BufferGuard(self.network)
        self.loss_sum = torch.zeros((), device=self.fabric.device)
        self.saved_at = time.monotonic()
        self.fresh_checkpoint = False
        self.sharded = isinstance(self.raw_network, FSDPModule)
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)

    # The course of a run

    def fit(self) -> None:
        """Train from wherever the run is to the last epoch.

        Raises:
            RunStoppedError: on a signal, after saving.
            ValueError: for faults of the data, the disk or the settings; the last checkpoint stays.
        """
        if not self.store.candidates():
            self.save()  # there is a good checkpoint to go back to from the first step on
        try:
            while self.progress.epoch < self.config.epochs:
                try:
                    self.train_epoch()
                except DivergedError:
                    self.roll_back()
                    continue
                self.finish_epoch()
        except RuntimeError as error:  # in validation; of training batches, fetch tells
            raise lost_worker(error, LOST) or error from None

    def train_epoch(self) -> None:
        """The steps of the present epoch that are not done yet."""
        progress = self.progress
        self.network.train()
        for module in self.frozen:
            module.eval()
        started = time.perf_counter()
        with closing(self.batches.epoch(progress.epoch, first=progress.step, salt=progress.rollbacks)) as batches:
            while progress.step < self.batches.steps:
                self.train_step(batches)
                progress.step += 1
                now = time.perf_counter()
                progress.epoch_seconds += now - started
                started = now
                self.log.on_step(
                    self.global_step, total=self.config.epochs * self.batches.steps, lr=self.lr, loss=self.mean_loss
                )
                if progress.bad >= self.config.safety.bad_steps:
                    raise DivergedError
                self.save_or_stop()

    def finish_epoch(self) -> None:
        """Test, note the epoch, keep the weights if they are the best, and save."""
        progress, started = self.progress, time.perf_counter()
        last = progress.epoch + 1 == self.config.epochs
        measures: dict[str, float] = {}
        if last or (progress.epoch + 1) % self.config.validate_every == 0:
            measures = self.validate()
        progress.seconds += progress.epoch_seconds + time.perf_counter() - started
        loss = float(self.fabric.all_reduce(self.loss_sum, reduce_op="mean")) / max(1, progress.counted)
        images = self.batches.steps * self.batches.share.batch_size
        self.log.rows.append(
            dict(
                epoch=progress.epoch + 1, step=self.global_step, lr=self.lr, loss=loss, **measures,
                skipped=progress.skipped, images_per_second=round(images / max(progress.epoch_seconds, 1e-9), 1),
                seconds=round(progress.seconds, 1),
            )
        )  # fmt: skip
        score = measures.get(self.task.main_metric, -1.0)
        if math.isnan(score):  # nothing to measure by: of weights that were never measured the last are the best
            better = progress.best < 0
        else:
            better = score > progress.best
            progress.best = max(score, progress.best)
        progress.epoch, progress.step, progress.counted, progress.epoch_seconds = progress.epoch + 1, 0, 0, 0.0
        self.loss_sum.zero_()
        self.log.write(better=better)
        self.save()
        self.save_or_stop()

    @property
    def global_step(self) -> int:
        """Steps done since the run began."""
        return self.progress.epoch * self.batches.steps + self.progress.step

    @property
    def lr(self) -> float:
        """The largest learning rate of the groups, that of the last layers."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def mean_loss(self) -> float:
        """Of the steps of the epoch so far, on this process."""
        return float(self.loss_sum) / max(1, self.progress.counted)

    # One step

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One change of the weights, or none where loss or gradient is not finite."""
        step, accumulate = self.global_step, self.batches.share.accumulate
        self.schedule.step_update(step)
        self.guard.keep()
        total = torch.zeros_like(self.loss_sum)
        for part in range(accumulate):
            batch = self.fetch(batches)
            self.seed(step, part)
            with self.fabric.no_backward_sync(self.network, enabled=part + 1 < accumulate):
                loss = self.task.loss(self.network, batch) / accumulate
                # A loss that is not finite on one process must be one to all: its gradient is made NaN everywhere.
                self.fabric.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
            total += loss.detach()
        limit = self.config.optim.clip_norm or float("inf")
        norm = self.fabric.clip_gradients(self.network, self.optimizer, max_norm=limit, error_if_nonfinite=False)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if norm is not None and bool(norm.isfinite()):
            self.optimizer.step()
            self.loss_sum += total
            self.progress.counted += 1
            self.progress.bad = 0
            if self.average is not None:
                self.average.update(self.raw_network, step=step + 1)
        else:
            self.skip_step(total)
        self.optimizer.zero_grad(set_to_none=True)

    def skip_step(self, loss: Tensor) -> None:
        """Leave weights, moments, statistics and average as they were, and count."""
        self.progress.skipped += 1
        # In fp16 the scale of the loss is found by overflows now and then; they are no sign of divergence.
        seeking = self.scaler is not None and self.scaler.get_scale() > 1 and bool(loss.isfinite())
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.optimizer.step()  # nothing to change without gradients; lowers the scale
        if not seeking:
            self.progress.bad += 1
        self.guard.restore()

    def seed(self, step: int, part: int) -> None:
        """Mixing (numpy, the same on all processes) and stochastic depth (torch) follow from the step alone."""
        numbers = (self.config.seed, step, part, self.progress.rollbacks)
        np.random.seed(derive_seed(*numbers) & 0xFFFFFFFF)  # timm draws from the global generator
        torch.manual_seed(derive_seed(*numbers, self.fabric.global_rank))

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch on the device; what of it was unreadable is noted.

        Where a loading process is lost, the run is saved as it was before the step.
        """
        try:
            loaded = next(batches)
        except WORKER_ERRORS as error:
            lost = lost_worker(error, LOST)
            if lost is None:
                raise
            if self.fabric.world_size == 1:
                self.guard.restore()
                self.save_or_stop()
                self.save()
            raise lost from None
        batch = self.place(loaded)
        if not len(batch.labels):
            raise ValueError(
                f"none of the {len(loaded.unreadable)} images tried for a batch can be read; the first: "
                f"{loaded.unreadable[0]}; the others are listed in {self.unreadable.path}"
            )
        return batch

    def place(self, batch: Batch) -> Batch:
        self.unreadable.add(batch.unreadable)
        images, labels = self.fabric.to_device((batch.images, batch.labels))
        if self.config.runtime.channels_last and isinstance(images, Tensor) and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return Batch(images, labels, ())

    # Tests

    @property
    def raw_network(self) -> nn.Module:
        """The network without Fabric's and the strategy's wrappers."""
        module = getattr(self.network, "module", self.network)
        return getattr(module, "module", module)

    @property
    def tested(self) -> nn.Module:
        """The network that is tested and kept: the average where there is one."""
        return self.raw_network if self.average is None else self.average.module

    def validate(self) -> dict[str, float]:
        """The measures over all images to test on."""
        network, metrics = self.tested.eval(), self.task.make_metrics()
        with torch.no_grad(), self.fabric.autocast(), gathered(network), self.tests.batches() as batches:
            for loaded in batches:
                batch = self.place(loaded)
                if len(batch.labels):
                    metrics.update(network, batch)
                if self.fabric.world_size == 1 and self.stop.signum is not None:
                    self.save_or_stop()
        return metrics.measures(self.fabric)

    # Checkpoints

    def save_or_stop(self) -> None:
        """Save when it is time; on a signal save and raise RunStoppedError. All processes decide alike."""
        safety, step = self.config.safety, self.global_step
        stop, due = self.stop.signum, time.monotonic() - self.saved_at > 60 * safety.minutes
        if self.fabric.world_size > 1:
            if step % SYNC_EVERY and self.progress.step:
                stop, due = None, False
            else:
                wishes = torch.tensor([float(stop or 0), float(due)], device=self.fabric.device)
                torch.distributed.all_reduce(wishes, op=torch.distributed.ReduceOp.MAX)
                stop, due = int(wishes[0]) or None, bool(wishes[1])
        if stop is not None or due or (safety.steps and step % safety.steps == 0 and self.progress.step):
            self.save()
        if stop is not None:
            where = f"epoch {self.progress.epoch + 1}, step {self.progress.step} of {self.batches.steps}"
            raise RunStoppedError(stop, f"stopped and saved at {where}; go on with the same command and --resume")

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        # To ask a sharded optimiser for its state before its first step would count as one.
        state = self.state(optimizer=not self.sharded or bool(self.optimizer.state))
        state |= dict(
            progress=dataclasses.asdict(self.progress),
            loss_sum=float(self.loss_sum),
            log=self.log.rows,
            average=self.average.module.state_dict() if self.average is not None else None,
            scaler=self.scaler.state_dict() if self.scaler is not None else None,
            identity=self.identity,
        )
        self.store.write(lambda path: self.fabric.save(path, state), first_process=self.fabric.is_global_zero)
        self.saved_at = time.monotonic()
        self.fresh_checkpoint = True

    def state(self, *, optimizer: bool = True) -> dict[str, Any]:
        """What Fabric saves and loads in its own way."""
        return dict(network=self.network) | (dict(optimizer=self.optimizer) if optimizer else {})

    def load(self, path: Path) -> None:
        """Put everything into the state of a checkpoint."""
        begun = "optimizer" in torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not begun:
            self.optimizer.state.clear()
        rest = self.fabric.load(path, self.state(optimizer=begun))
        self.progress = Progress(**renew(dict(progress=rest["progress"]))["progress"])
        self.loss_sum.fill_(rest["loss_sum"])
        self.log.rows = rest["log"]
        if self.average is not None:
            self.average.module.load_state_dict(rest["average"])
        if self.scaler is not None and rest["scaler"]:
            self.scaler.load_state_dict(rest["scaler"])

    def roll_back(self) -> None:
        """Return to the last good checkpoint, or to the one before it where nothing was saved since the last rollback.

        Raises:
            ValueError: where the run has gone back too often.
        """
        rollbacks, skipped, step = self.progress.rollbacks + 1, self.progress.skipped, self.global_step
        limit = self.config.safety.rollbacks
        if rollbacks > limit:
            raise ValueError(
                f"at step {step} the loss or its gradient was again not finite {self.config.safety.bad_steps} times in "
                f"a row, after {limit} rollbacks to a checkpoint; lower optim.lr, or set runtime.precision to fp32"
            )
        good = [path for path in self.store.candidates() if check_archive(path) is None]
        if not good:
            raise ValueError(f"{self.store.folder}: there is no checkpoint to go back to; begin again with --overwrite")
        self.load(good[0] if self.fresh_checkpoint or len(good) == 1 else good[1])
        self.fresh_checkpoint = False
        self.progress.rollbacks, self.progress.skipped, self.progress.bad = rollbacks, skipped, 0
        self.log.tell(
            f"the loss or its gradient was not finite {self.config.safety.bad_steps} times in a row up to step {step}; "
            f"went back to the checkpoint of step {self.global_step} (rollback {rollbacks} of {limit})"
        )
