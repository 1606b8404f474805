"""A training run from a configuration to the folder of a trained classifier."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric import Fabric
from rich.console import Console
from torch import nn

from overlock.checkpoint import (
    CONFIG_FILE,
    MODEL_FILE,
    Record,
    build,
    default_preprocessing,
    save_classifier,
    to_timm_config,
)
from overlock.data import ImageData, load_data, make_eval_transform, make_train_transform
from overlock.data.images import save_examples
from overlock.data.loaders import TrainBatches, make_test_loader
from overlock.files import write_atomically
from overlock.hub import CARD_FILE, find_weights, write_card
from overlock.network import VARIANTS
from overlock.training import reports
from overlock.training.config import TrainConfig
from overlock.training.loop import Fit
from overlock.training.machine import full_state, keep_freed_memory, make_fabric, make_share
from overlock.training.optim import freeze, make_average, make_optimizer, make_schedule
from overlock.training.state import CheckpointStore, differing
from overlock.training.stop import RunStoppedError, StopRequest
from overlock.training.sync_norm import synchronise_norms
from overlock.training.task import Classification
from overlock.weights import load_weights

SETTINGS_FILE, CHECKPOINTS, EXAMPLES, BEST_FILE = "config.yaml", "checkpoints", "examples", "best.safetensors"
# Settings that may change when a run is resumed: they do not change what is computed, but for rounding. The strategy
# does not either, but it tells how checkpoints are written.
CHANGEABLE = ("output", "machine.", "safety.")
FIXED = ("machine.strategy",)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to."""

    accuracy: float
    """Share of the held-out images that the final weights name rightly."""
    best: float
    """The highest such share over the epochs."""
    seconds: float
    """Of training and testing, over all sessions of the run."""
    folder: Path
    """With the weights, their record, the settings, the log and the checkpoints."""


def train(
    config: TrainConfig, *, overwrite: bool = False, resume: bool = False, console: Console | None = None
) -> TrainResult:
    """Train a classifier and write it to ``config.output``.

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
    folder = Path(config.output)
    with StopRequest() as stop, quiet():
        fabric = make_fabric(config.machine)
        fabric.launch()
        if fabric.device.type == "cpu":
            keep_freed_memory()
        if fabric.is_global_zero:
            check_output(folder, overwrite=overwrite, resume=resume)
        fabric.barrier()
        fit, record, data = prepare(config, fabric, stop, console or Console(quiet=True))
        resumed = resume and bool(fit.store.candidates())
        try:
            if resumed:
                take_up(fit)
            else:
                begin(fit, folder, config)
            fit.run()
        except RunStoppedError as stopped:
            fit.log.tell(str(stopped))
            raise
        finally:
            fit.log.close()
    finish(fit, record, data)
    accuracy, seconds = fit.log.rows[-1]["top1"], fit.progress.seconds
    fit.log.tell(f"test accuracy {100 * accuracy:.2f} % after {seconds:.0f} s; saved in {folder}")
    fit.log.tell(f"try: overlock predict IMAGE --checkpoint {folder}")
    return TrainResult(accuracy=accuracy, best=fit.progress.best, seconds=seconds, folder=folder)


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


def prepare(config: TrainConfig, fabric: Fabric, stop: StopRequest, console: Console) -> tuple[Fit, Record, ImageData]:
    """Data, network, optimiser and all else that a run needs; nothing is written."""
    folder = Path(config.output)
    share = make_share(fabric, config)
    data = load_data(
        config.data,
        seed=config.seed,
        train_split=config.train_split,
        val_split=config.val_split,
        classes=config.classes,
    )
    torch.manual_seed(config.seed)  # the initial weights, the same on all processes
    network, record = make_network(config, data)
    frozen = freeze(network, config.freeze)
    if fabric.world_size > 1 and config.machine.sync_norm:
        network = synchronise_norms(network, cuda=fabric.device.type == "cuda")
    if config.machine.recompute:
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    if config.machine.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = fabric.to_device(network)
    average = make_average(network, config.ema)
    if config.machine.compile:
        network.compile()
    wrapped = fabric.setup_module(network)
    optimizer = make_optimizer(network, config.optim, batch_size=config.batch_size)  # sharding renews the parameters
    schedule = make_schedule(optimizer, config, steps_per_epoch=max(1, len(data.train) // config.batch_size))
    optimizer = fabric.setup_optimizers(optimizer)
    workers, pin = config.machine.workers, fabric.device.type == "cuda"
    batches = TrainBatches(
        data.train, make_train_transform(record.preprocessing, config.augment, mirror=data.mirrors), share,
        seed=config.seed, repeats=config.augment.repeats, workers=workers, pin_memory=pin,
    )  # fmt: skip
    tests = make_test_loader(
        data.test, make_eval_transform(record.preprocessing), batch_size=2 * share.micro_batch,
        rank=fabric.global_rank, world=fabric.world_size, workers=workers, pin_memory=pin,
    )  # fmt: skip
    identity = dict(settings=config.to_dict(), classes=list(data.classes), train=len(data.train), test=len(data.test))
    fit = Fit(
        fabric=fabric, config=config, task=Classification(config.loss, len(data.classes)), network=wrapped,
        frozen=frozen, optimizer=optimizer,
        schedule=schedule, average=average,
        batches=batches, tests=tests, store=CheckpointStore(folder / CHECKPOINTS),
        log=reports.RunLog(folder, console, keep_best=lambda: keep_weights(fit, record, BEST_FILE),
                           first_process=fabric.is_global_zero),
        unreadable=reports.Unreadable(folder, config.safety.unreadable), stop=stop, identity=identity,
    )  # fmt: skip
    fit.log.tell(
        f"{config.model}: {sum(p.numel() for p in fit.raw_network.parameters()) / 1e6:.2f} M parameters; "
        f"{len(data.train)} images to train on, {len(data.test)} held out, {len(data.classes)} classes"
    )
    return fit, record, data


def begin(fit: Fit, folder: Path, config: TrainConfig) -> None:
    """Write the settings and clear away what an earlier run left."""
    if fit.fabric.is_global_zero:
        for path in fit.store.candidates():
            path.unlink()
        for name in (MODEL_FILE, BEST_FILE, reports.UNREADABLE, reports.LOG, reports.CURVES):
            (folder / name).unlink(missing_ok=True)
        write_atomically(folder / SETTINGS_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
        write_atomically(folder / reports.ENVIRONMENT, reports.describe_environment())
    fit.log.open(begin=True)
    fit.fabric.barrier()


def take_up(fit: Fit) -> None:
    """Load the newest checkpoint without damage.

    Raises:
        ValueError: where there is none, or where settings or data have changed since.
    """
    path, problems = fit.store.find_good()
    for problem in problems:
        fit.log.tell(f"{problem}; going on from {path.name}")
    identity = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["identity"]
    changed = [
        name
        for name in differing(identity["settings"], fit.identity["settings"])
        if name in FIXED or not name.startswith(CHANGEABLE)
    ]
    if changed:
        raise ValueError(
            f"{path}: this run was begun with other settings of {', '.join(changed)}; repeat its own command with "
            f"--resume (its settings are in {SETTINGS_FILE}), or choose another output"
        )
    lost = sorted(set(identity["classes"]) - set(fit.identity["classes"]))
    if identity["classes"] != fit.identity["classes"]:
        what = f"class {lost[0]!r} is no longer there" if lost else "there are other classes"
        raise ValueError(f"{fit.config.data}: {what} since the run was begun; put the data back as they were")
    for part in ("train", "test"):
        if identity[part] != fit.identity[part]:
            raise ValueError(
                f"{fit.config.data}: {fit.identity[part]} {part} images where the run was begun with {identity[part]}; "
                f"put the data back as they were"
            )
    fit.load(path)
    fit.log.open(begin=False)
    progress = fit.progress
    fit.log.tell(f"going on from epoch {progress.epoch + 1}, step {progress.step} of {fit.batches.steps}")


def make_network(config: TrainConfig, data: ImageData) -> tuple[nn.Module, Record]:
    """The network to train, and the record of what prediction will need."""
    ours = config.model in VARIANTS
    arguments: dict[str, Any] = dict(in_chans=config.in_chans, num_classes=len(data.classes))
    if config.stem_stride is not None:
        arguments["stem_stride"] = config.stem_stride
    rate = VARIANTS[config.model].drop_path if ours and config.drop_path is None else config.drop_path
    only_training: dict[str, Any] = dict(drop_path_rate=rate) if rate else {}
    if ours and config.loss.aux_weight:
        only_training["aux_head"] = True
    try:
        network = build(config.model, pretrained=config.pretrained, **arguments, **only_training)
    except OSError as error:
        raise ValueError(f"the weights of {config.model} could not be fetched ({error}); try --weights FILE") from None
    if config.weights is not None:
        if not ours:
            raise ValueError(f"weights are read for OverLoCK's models, not for {config.model}; try --pretrained true")
        load_weights(network, find_weights(config.weights))
    smallest = getattr(network, "smallest_image", 1)
    if config.image_size < smallest:
        raise ValueError(f"image_size must be at least {smallest} with this stem, got {config.image_size}")
    preprocessing = default_preprocessing(
        network, in_chans=config.in_chans, image_size=config.image_size, crop_pct=data.crop_pct
    )
    return network, Record(model=config.model, model_args=arguments, classes=data.classes, preprocessing=preprocessing)


def keep_weights(fit: Fit, record: Record, name: str) -> None:
    """Write the tested weights and their record, without the auxiliary head, to a file of the run's folder."""
    state = full_state(fit.tested)
    if fit.fabric.is_global_zero:
        state = {part: t for part, t in state.items() if not part.startswith("aux_head.")}
        save_classifier(Path(fit.config.output) / name, state, record)


def finish(fit: Fit, record: Record, data: ImageData) -> None:
    """Write all that the run's folder is for: weights, timm's configuration, model card, curves, examples."""
    keep_weights(fit, record, MODEL_FILE)
    if fit.fabric.is_global_zero:
        folder, config = Path(fit.config.output), fit.config
        write_atomically(folder / CONFIG_FILE, to_timm_config(record))
        rows = fit.log.rows
        reports.draw_curves(rows, folder / reports.CURVES, title=f"{config.model} on {Path(config.data).name}")
        write_card(folder / CARD_FILE, record, settings=config.to_dict(), row=rows[-1], data=config.data)
        save_examples(data, folder / EXAMPLES)
    fit.fabric.barrier()


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
