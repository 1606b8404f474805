"""A training run from a configuration to the files of a trained classifier."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

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
from overlock.data.images import LabelledImages, save_examples
from overlock.files import write_atomically
from overlock.network import VARIANTS
from overlock.training.config import TrainConfig
from overlock.weights import load_weights

SETTINGS_FILE, EXAMPLES_FOLDER = "train.yaml", "examples"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to."""

    accuracy: float
    """Share of the held-out images that the final weights name rightly."""
    seconds: float
    """Of training, loading and testing included."""
    folder: Path
    """With the weights, their record and the settings."""


def train(config: TrainConfig, *, overwrite: bool = False, console: Console | None = None) -> TrainResult:
    """Train a classifier and write it to ``config.output``.

    Args:
        config: all settings.
        overwrite: replace the files of an earlier run.
        console: where progress is shown; silent without.

    Raises:
        ValueError: for data, weights, a model or an output folder that will not do; then nothing is written.
    """
    folder = Path(config.output)
    check_output(folder, overwrite=overwrite)
    lightning, modules, progress = _import_lightning()
    console = console or Console(quiet=True)

    lightning.seed_everything(config.seed, verbose=False)
    data = load_data(config.data, seed=config.seed)
    network, record = make_network(config, data)
    console.print(
        f"{config.model}: {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters; "
        f"{len(data.train)} images to train on, {len(data.test)} held out, {len(data.classes)} classes",
        highlight=False,
    )
    task = modules.Classifier(network, config, len(data.classes))
    started = time.perf_counter()
    with quiet():
        trainer = lightning.Trainer(
            max_epochs=config.epochs,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            gradient_clip_val=5.0,
            callbacks=[progress.EpochProgress(console)],
        )
        try:
            trainer.fit(task, *make_loaders(config, data, record))
        except SystemExit:
            if trainer.interrupted:  # Lightning turns Ctrl-C into an exit
                raise KeyboardInterrupt from None
            raise
    seconds = time.perf_counter() - started
    accuracy = float(trainer.callback_metrics["accuracy"])

    write_atomically(folder / SETTINGS_FILE, yaml.safe_dump(asdict(config), sort_keys=False))
    write_atomically(folder / CONFIG_FILE, to_timm_config(record))
    save_examples(data, folder / EXAMPLES_FOLDER)
    save_classifier(folder / MODEL_FILE, task.weights(), record)
    return TrainResult(accuracy=accuracy, seconds=seconds, folder=folder)


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise ValueError where results cannot be written, or would replace something unasked."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{folder}: cannot be a folder, since {existing} is a file; choose another output")
    if folder.exists() and not overwrite and any(folder.iterdir()):
        raise ValueError(f"{folder}: the output folder is not empty; choose another one or pass --overwrite")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: no permission to write here; choose another output")


def make_network(config: TrainConfig, data: ImageData) -> tuple[nn.Module, Record]:
    """The network to train, and the record of what prediction will need."""
    ours = config.model in VARIANTS
    arguments: dict[str, Any] = dict(in_chans=config.in_chans, num_classes=len(data.classes))
    if config.stem_stride is not None:
        arguments["stem_stride"] = config.stem_stride
    try:
        network = build(
            config.model, pretrained=config.pretrained, **arguments, **(dict(aux_head=True) if ours else {})
        )
    except OSError as error:
        raise ValueError(f"the weights of {config.model} could not be fetched ({error}); try --weights FILE") from None
    if config.weights is not None:
        if not ours:
            raise ValueError(f"weights are read for OverLoCK's models, not for {config.model}; try --pretrained true")
        load_weights(network, config.weights)
    smallest = getattr(network, "smallest_image", 1)
    if config.image_size < smallest:
        raise ValueError(f"image_size must be at least {smallest} with this stem, got {config.image_size}")
    preprocessing = default_preprocessing(
        network, in_chans=config.in_chans, image_size=config.image_size, crop_pct=data.crop_pct
    )
    return network, Record(model=config.model, model_args=arguments, classes=data.classes, preprocessing=preprocessing)


def make_loaders(config: TrainConfig, data: ImageData, record: Record) -> tuple[DataLoader, DataLoader]:
    """Batches of training images, shuffled and changed at random, and of held-out images."""
    mirror = data.mirrors if config.mirror is None else config.mirror
    augment = make_train_transform(record.preprocessing, augmentation=config.augmentation, mirror=mirror)
    common: dict[str, Any] = dict(num_workers=config.workers, persistent_workers=config.workers > 0)
    # Batch norm cannot learn from a last batch of one image.
    drop_last = len(data.train) % config.batch_size == 1 and len(data.train) > config.batch_size
    return (
        DataLoader(
            LabelledImages(data.train, augment),
            batch_size=config.batch_size,
            shuffle=True,
            drop_last=drop_last,
            **common,
        ),
        DataLoader(
            LabelledImages(data.test, make_eval_transform(record.preprocessing)),
            batch_size=2 * config.batch_size,
            **common,
        ),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning without its tips and warnings."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
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


def _import_lightning() -> tuple[Any, Any, Any]:
    try:
        with quiet():
            import lightning  # noqa: PLC0415

            from overlock.training import modules, progress  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"training needs a package that is not installed ({error.name}); run: pip install 'overlock[train]'"
        ) from None
    return lightning, modules, progress
