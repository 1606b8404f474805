"""What the trainer adds to a bare loop, and how many images a second its loader prepares.

    python benchmarks/trainer.py                 # overlock_atto, 128 images of 224 x 224 a step
    python benchmarks/trainer.py --images FOLDER # also the loader, on a folder of images by class

The bare loop is forward, loss, backward and optimiser step, on a batch at hand, with the same network, optimiser
and precision. Beside the same, a trainer's step seeds, schedules the learning rate, keeps the norms' statistics, checks
that loss and gradient are finite, counts and logs; with --recipe both also clip and average the weights. Steps of the
two are taken in turn, and medians compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from overlock.data import load_test_data, make_train_transform
from overlock.data.loaders import Batch, OnImage, Share, TrainBatches
from overlock.training import RECIPES, TrainConfig
from overlock.training.run import prepare, quiet
from overlock.training.runtime import keep_freed_memory, make_fabric
from overlock.training.stop import StopRequest
from overlock.training.trainer import Trainer


class BatchAtHand:
    """The same batch again and again, in the place of a loader."""

    def __init__(self, batch: Batch, steps: int):
        self.batch, self.steps, self.share = batch, steps, Share(micro_batch=len(batch.labels))

    def epoch(self, number: int, *, first: int = 0, salt: int = 0) -> Generator[Batch, None, None]:
        for _ in range(first, self.steps):
            yield self.batch


def make_trainer(options: argparse.Namespace, folder: Path) -> Trainer:
    """A run of the trainer that is ready to begin."""
    for name in "ab":
        (folder / "data" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "data" / name / f"{i}.png")
    settings = dict(
        data=str(folder / "data"),
        output=str(folder / "run"),
        model=options.model,
        image_size=options.image_size,
        batch_size=options.batch_size,
        optim=dict(clip_norm=5.0 if options.recipe else 0.0),
        ema=dict(decay=0.9999 if options.recipe else 0.0),
        runtime=dict(precision=options.precision, workers=0),
        safety=dict(minutes=1e6),
    )
    config = TrainConfig.from_dict(settings)
    with quiet():
        keep_freed_memory()  # as a run does on CPU
        trainer, *_ = prepare(config, make_fabric(config.runtime), StopRequest(), Console(quiet=True))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, generator=generator)
    labels = torch.randint(0, 2, (options.batch_size,), generator=generator)
    device = trainer.fabric.device
    trainer.batches = BatchAtHand(Batch(images.to(device), labels.to(device), ()), steps=10**6)
    return trainer


def make_bare_step(trainer: Trainer, *, recipe: bool) -> Callable[[], None]:
    """Forward, loss, backward and step, and nothing else."""
    batch = next(trainer.batches.epoch(0))
    network, optimizer = trainer.network, trainer.optimizer
    parameters = [p for p in trainer.raw_network.parameters() if p.requires_grad]

    def step() -> None:
        trainer.fabric.backward(trainer.task.loss(network, batch))
        if recipe:
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if trainer.average is not None:
            trainer.average.update(trainer.raw_network, step=10)

    return step


def make_trainer_step(trainer: Trainer) -> Callable[[], None]:
    """A turn of the trainer's loop."""
    batches = trainer.batches.epoch(0)

    def step() -> None:
        trainer.train_step(batches)
        trainer.progress.step += 1
        trainer.log.on_step(trainer.global_step, total=10**6, lr=trainer.lr, loss=trainer.mean_loss)
        trainer.save_or_stop()

    return step


def compare(steps: dict[str, Callable[[], None]], *, rounds: int, warmup: int) -> dict[str, float]:
    """Median seconds of each, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warmup + rounds):
        order = list(steps) if number % 2 else list(reversed(steps))
        for name in order:
            started = time.perf_counter()
            steps[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_loader(folder: str, *, workers: int, batch_size: int, image_size: int) -> float:
    """Images a second, decoded and augmented as in the ImageNet recipe."""
    data = load_test_data(folder)
    preprocessing = dict(
        input_size=(3, image_size, image_size), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.95
    )
    transform = make_train_transform(preprocessing, RECIPES["imagenet_t"]("x").augment)
    loader = TrainBatches(data.test, OnImage(transform), Share(micro_batch=batch_size), seed=0, workers=workers)
    batches = loader.epoch(0)
    next(batches)
    started = time.perf_counter()
    count = sum(len(batch.labels) for batch in batches)
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="overlock_atto")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--recipe", action="store_true", help="clip the gradient and average the weights, in both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", help="folder of images by class, to time the loader with")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, Path(folder))
        trainer.network.train()
        steps = {"bare": make_bare_step(trainer, recipe=options.recipe), "trainer": make_trainer_step(trainer)}
        seconds = compare(steps, rounds=options.rounds, warmup=2)
        trainer.log.close()
    over = seconds["trainer"] / seconds["bare"] - 1
    sys.stdout.write(
        f"{options.model}, {options.batch_size} x {options.image_size} x {options.image_size}, {options.precision}, "
        f"{trainer.fabric.device}{', recipe' if options.recipe else ''}: bare {1e3 * seconds['bare']:.1f} ms, "
        f"trainer {1e3 * seconds['trainer']:.1f} ms, {100 * over:+.1f} %\n"
    )
    if options.images:
        speed = measure_loader(
            options.images, workers=options.workers, batch_size=options.batch_size, image_size=options.image_size
        )
        sys.stdout.write(f"loader: {speed:.0f} images/s with {options.workers} processes\n")


if __name__ == "__main__":
    main()
