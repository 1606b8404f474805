"""A training run from a configuration to the folder of a trained network."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.fabric import Fabric
from rich.console import Console
from torch import nn

from overlock.checkpoints import CARD_FILE, MODEL_FILE, save_model, write_card
from overlock.data.loaders import TrainBatches, make_test_loader
from overlock.files import write_atomically
from overlock.training import classification, detection, reports, segmentation
from overlock.training.config import RunConfig
from overlock.training.effects import tell_effects
from overlock.training.job import Job
from overlock.training.optim import freeze, make_average, make_optimizer, make_schedule
from overlock.training.runtime import full_state, gathered, keep_freed_memory, make_fabric, make_share
from overlock.training.state import CheckpointStore, differing
from overlock.training.stop import RunStoppedError, StopRequest
from overlock.training.sync_bn import synchronise_norms
from overlock.training.trackers import check_tracker
from overlock.training.trainer import Trainer

SETTINGS_FILE, CHECKPOINTS, BEST_FILE = "config.yaml", "checkpoints", "best.safetensors"
JOBS: dict[str, Callable[[Any], Job]] = dict(
    classify=classification.make_job, detect=detection.make_job, segment=segmentation.make_job
)
# Settings that may change when a run is resumed: they do not change what is computed, but for rounding. The strategy
# does not either, but it tells how checkpoints are written.
CHANGEABLE = ("logger", "output", "runtime.", "safety.")
FIXED = ("runtime.strategy",)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to."""

    score: float
    """The task's main measure of the final weights on the held-out images: a classifier's accuracy, a detector's
    average precision, a segmenter's mean IoU; NaN where there was nothing to find."""
    best: float
    """The highest over the epochs; -1 where there was none."""
    seconds: float
    """Of training and testing, over all sessions of the run."""
    folder: Path
    """With the weights, their record, the settings, the log and the checkpoints."""


def train(
    config: RunConfig, *, overwrite: bool = False, resume: bool = False, console: Console | None = None
) -> TrainResult:
    """Train a network and write it to ``config.output``.

    Args:
        config: all settings.
        overwrite: replace the files of an earlier run.
        resume: go on with the run in the output folder where there is one, else begin.
        console: where progress is shown; silent without.

    Raises:
        ValueError: for data, weights, a model or an output folder that will not do, and for faults on the way, from
            which the run can be resumed.
        RunStoppedError: on Ctrl-C, SIGTERM or SIGUSR1, after saving.
    """
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it; give one of them")
    check_tracker(config.logger)
    folder = Path(config.output)
    with StopRequest() as stop, quiet():
        fabric = make_fabric(config.runtime)
        fabric.launch()
        if fabric.device.type == "cpu":
            keep_freed_memory()
        if fabric.is_global_zero:
            check_output(folder, overwrite=overwrite, resume=resume)
        fabric.barrier()
        trainer, job, notes = prepare(config, fabric, stop, console or Console(quiet=True))
        resumed = resume and bool(trainer.store.candidates())
        try:
            if resumed:
                resume_run(trainer)
            else:
                begin_run(trainer, folder, config, notes=notes)
            trainer.fit()
        except RunStoppedError as stopped:
            trainer.log.tell(str(stopped))
            raise
        finally:
            trainer.log.close()
    finish(trainer, job)
    name, seconds = trainer.task.main_metric, trainer.progress.seconds
    score = trainer.log.rows[-1][name]
    trainer.log.tell(
        f"test {trainer.task.shares[name]} {reports.as_percentage(score)} after {seconds:.0f} s; saved in {folder}"
    )
    trainer.log.tell(f"try: overlock predict IMAGE --checkpoint {folder}")
    return TrainResult(score=score, best=trainer.progress.best, seconds=seconds, folder=folder)


def check_output(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Raise ValueError where results cannot be written, or would replace something unasked."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{folder}: cannot be a folder, since {existing} is a file; choose another output")
    if folder.exists() and any(folder.iterdir()) and not (overwrite or resume):
        raise ValueError(
            f"{folder}: the output folder is not empty; choose another one, or pass --resume to go on with its run or "
            f"--overwrite to replace it"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: no permission to write here; choose another output")


class Prepared(NamedTuple):
    """A run that can begin or be resumed."""

    trainer: Trainer
    job: Job
    notes: tuple[str, ...]
    """On its data and settings, to be told."""


def prepare(config: RunConfig, fabric: Fabric, stop: StopRequest, console: Console) -> Prepared:
    """Data, network, optimiser and all else that a run needs; nothing is written."""
    folder = Path(config.output)
    share = make_share(fabric, config)
    job = JOBS[config.task](config)
    network, data = job.network, job.data
    frozen = freeze(network, config.freeze)
    if fabric.world_size > 1 and config.runtime.sync_bn:
        network = synchronise_norms(network, cuda=fabric.device.type == "cuda")
    if config.runtime.grad_checkpointing:
        checkpoint_gradients(network)
    if config.runtime.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = fabric.to_device(network)
    average = make_average(network, config.ema)
    if config.runtime.compile:
        network.compile()
    wrapped = fabric.setup_module(network)
    optimizer = make_optimizer(network, config.optim, batch_size=config.batch_size)  # sharding renews the parameters
    loading: dict[str, Any] = dict(workers=config.runtime.workers, pin_memory=fabric.device.type == "cuda")
    batches = TrainBatches(
        data.train, job.prepare_train, share, seed=config.seed, join=job.join_train, epoch_steps=config.epoch_steps,
        repeats=job.repeats, **loading,
    )  # fmt: skip
    tests = make_test_loader(
        data.test, job.prepare_test, batch_size=job.test_batch or 2 * share.micro_batch, join=job.join_test,
        rank=fabric.global_rank, world=fabric.world_size, **loading,
    )  # fmt: skip
    schedule = make_schedule(optimizer, config, steps_per_epoch=batches.steps)
    optimizer = fabric.setup_optimizers(optimizer)
    identity = dict(settings=config.to_dict(), classes=list(data.classes), train=len(data.train), test=len(data.test))
    log = reports.RunLog(
        folder, console, epochs=config.epochs, main_metric=job.task.main_metric,
        metric_name=job.task.shares[job.task.main_metric], first_process=fabric.is_global_zero,
        keep_best=lambda: keep_weights(trainer, job, BEST_FILE),
    )  # fmt: skip
    trainer = Trainer(
        fabric=fabric, config=config, task=job.task, network=wrapped, frozen=frozen, optimizer=optimizer,
        schedule=schedule, average=average, batches=batches, tests=tests, store=CheckpointStore(folder / CHECKPOINTS),
        log=log, unreadable=reports.Unreadable(folder, config.safety.unreadable), stop=stop, identity=identity,
    )  # fmt: skip
    trainer.log.tell(
        f"{job.record.name}: {sum(p.numel() for p in trainer.raw_network.parameters()) / 1e6:.2f} M parameters; "
        f"{len(data.train)} images to train on, {len(data.test)} held out, {len(data.classes)} classes"
    )
    notes = (*data.notes, *tell_effects(config, steps_per_epoch=batches.steps, images=len(data.train)))
    for note in notes:
        trainer.log.tell(note)
    return Prepared(trainer, job, notes)


def checkpoint_gradients(network: nn.Module) -> None:
    """Have the network, or the backbone in it, recompute activations in the backward pass.

    Raises:
        ValueError: for a network that cannot.
    """
    for module in network.modules():
        switch: Any = getattr(module, "set_grad_checkpointing", None)
        if switch is not None:
            switch(True)
            return
    raise ValueError("this network cannot recompute its activations; set runtime.grad_checkpointing to false")


def begin_run(trainer: Trainer, folder: Path, config: RunConfig, *, notes: tuple[str, ...]) -> None:
    """Write the settings and the notes on the data, and clear away what an earlier run left."""
    if trainer.fabric.is_global_zero:
        for path in trainer.store.candidates():
            path.unlink()
        for name in (MODEL_FILE, BEST_FILE, reports.UNREADABLE, reports.LOG, reports.CURVES, reports.NOTES):
            (folder / name).unlink(missing_ok=True)
        write_atomically(folder / SETTINGS_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
        if notes:
            write_atomically(folder / reports.NOTES, "\n".join(notes) + "\n")
        write_atomically(folder / reports.ENVIRONMENT, reports.describe_environment())
    trainer.log.open(config, begin=True)
    trainer.fabric.barrier()


def resume_run(trainer: Trainer) -> None:
    """Load the newest checkpoint without damage.

    Raises:
        ValueError: where there is none, or where settings or data have changed since.
    """
    path, problems = trainer.store.find_good()
    for problem in problems:
        trainer.log.tell(f"{problem}; going on from {path.name}")
    identity = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["identity"]
    # By way of the settings' class, so that fields which the checkpoint's version did not have are at their defaults.
    before, now = type(trainer.config).from_dict(identity["settings"]).to_dict(), trainer.identity
    changed = [name for name in differing(before, now["settings"]) if name in FIXED or not name.startswith(CHANGEABLE)]
    if changed:
        raise ValueError(
            f"{path}: this run was begun with other settings of {', '.join(changed)}; repeat its own command with "
            f"--resume (its settings are in {SETTINGS_FILE}), or choose another output"
        )
    lost = sorted(set(identity["classes"]) - set(now["classes"]))
    if identity["classes"] != now["classes"]:
        what = f"class {lost[0]!r} is no longer there" if lost else "there are other classes"
        raise ValueError(f"{trainer.config.data}: {what} since the run was begun; put the data back as they were")
    for part in ("train", "test"):
        if identity[part] != now[part]:
            raise ValueError(
                f"{trainer.config.data}: {now[part]} {part} images where the run was begun with {identity[part]}; put "
                "the data back as they were"
            )
    trainer.load(path)
    trainer.log.open(trainer.config, begin=False)
    progress = trainer.progress
    trainer.log.tell(f"going on from epoch {progress.epoch + 1}, step {progress.step} of {trainer.batches.steps}")


def keep_weights(trainer: Trainer, job: Job, name: str) -> None:
    """Write the tested weights that are of use after training, and their record, to a file of the run's folder."""
    state = full_state(trainer.tested)
    if trainer.fabric.is_global_zero:
        state = {part: tensor for part, tensor in state.items() if not part.startswith(job.only_training)}
        save_model(Path(trainer.config.output) / name, state, job.record)


def finish(trainer: Trainer, job: Job) -> None:
    """Write all that the run's folder is for: weights, curves, model card, and what else the task has."""
    keep_weights(trainer, job, MODEL_FILE)
    if trainer.fabric.is_global_zero:
        folder, rows = Path(trainer.config.output), trainer.log.rows
        title = f"{job.record.name} on {Path(trainer.config.data).name}"
        reports.draw_curves(rows, folder / reports.CURVES, shares=trainer.task.shares, title=title)
        measures = {label: rows[-1][name] for name, label in trainer.task.shares.items()}
        settings = trainer.config.to_dict()
        write_card(folder / CARD_FILE, job.record, settings=settings, measures=measures, data=trainer.config.data)
    with gathered(trainer.tested):  # which all processes take part in
        if trainer.fabric.is_global_zero:
            job.finish(Path(trainer.config.output), trainer.tested)
    trainer.fabric.barrier()


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning and timm without their tips and warnings."""
    names = ("lightning", "lightning.fabric", "lightning.pytorch", "timm")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
