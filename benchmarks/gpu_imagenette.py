"""OverLoCK-Nano and a timm model of its size on Imagenette, from scratch, by one recipe on one GPU in minutes.

    python benchmarks/gpu_imagenette.py --minutes 3 --data IMAGENETTE --out results
    python benchmarks/gpu_imagenette.py --dry-run --minutes 2 --data IMAGENETTE --out results     # on CPU, tiny

Crops of 128 pixels, tests at 160. Both networks take the same number of steps, on the same crops in the same order.
Weights are written in float16 but for vectors, which stay in float32, and they are tested so; the files are such as
``overlock evaluate`` takes.

It needs the package with its ``train`` extra, and no command line.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from captured import CapturedTraining
from fleet import Fleet, Job, Prepared, Row, add_options
from gpu_images import CroppedImages, Normalise, load_decoded, middle_crops, save_decoded
from timing import say
from torch import Tensor

from overlock.checkpoints import save_model
from overlock.data import ImageData
from overlock.data.augmentation import Augmentation
from overlock.data.images import read_classes
from overlock.ops.dispatch import ENVIRONMENT_VARIABLE
from overlock.training.classification import make_network
from overlock.training.config import EmaConfig, LossConfig, OptimConfig, TrainConfig

MODELS = ("overlock_nano", "convnext_femto")
"""5.31 M and 4.84 M parameters with ten classes."""
TRAIN_SIDE, WHOLE = 128, 214  # no image has a longer side
TEST_BATCH = 200
MOST_STEPS, DRY_STEPS, DRY_IMAGES = 5000, 20, 32
TESTS = 8
CUTMIX = 0.2
SEED = 0


def configs(data: str = "imagenette", dry: bool = False) -> dict[str, TrainConfig]:
    """The recipe, for each model. Random changes of images are those of gpu_images.py."""
    recipe = TrainConfig(
        data=data,
        model=MODELS[0],
        seed=SEED,
        image_size=160,
        epochs=20,  # of as many parts of the run, of which the warm-up is two
        batch_size=4 if dry else 256,
        drop_path=0.05,
        augment=Augmentation(scale=(0.35, 1.0), color_jitter=0.3),
        loss=LossConfig(label_smoothing=0.1, aux_weight=0.4),
        # on a CPU, products in bfloat16 would take most of a dry run
        optim=OptimConfig(name="adamw" if dry else "nmuon", lr=4e-3, base_batch_size=256, warmup_epochs=2),
        ema=EmaConfig(decay=0.998, warmup=True),
    )
    return {name: replace(recipe, model=name) for name in MODELS}


def halve(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels in float16, vectors as they are."""
    return {name: x.half() if x.dim() > 1 and x.is_floating_point() else x for name, x in state.items()}


def prepare(options: argparse.Namespace, decoded: Path) -> Prepared:
    """Both networks: side by side in one process, where the small kernels of one run beside those of the other."""
    device = "cpu" if options.dry_run else "cuda"
    most = DRY_STEPS if options.dry_run else MOST_STEPS
    classes = read_classes(Path(options.data) / "classes.txt")
    images, sizes, labels = load_decoded(decoded, "train", device)
    test = load_decoded(decoded, "test", device)
    trainings, records = [], []
    for config in configs(options.data, options.dry_run).values():
        torch.manual_seed(config.seed)
        network, record = make_network(config, ImageData(classes=classes, train=(), test=(), crop_pct=1.0))
        normalise = Normalise(record.preprocessing, device)
        draw = CroppedImages(
            images, sizes, labels, normalise, side=64 if options.dry_run else TRAIN_SIDE, batch=config.batch_size,
            steps=most, seed=config.seed, scale=config.augment.scale, jitter=float(config.augment.color_jitter),
            cutmix=CUTMIX, classes=len(classes),
        )  # fmt: skip
        network = network.to(device, memory_format=torch.channels_last)
        trainings.append(CapturedTraining(network, config, draw, most_steps=most, classes=len(classes)))
        records.append(record)
    tested: list[dict[int, float]] = [{} for _ in trainings]

    def tests() -> Iterator[tuple[Tensor, Tensor]]:
        for some, named in middle_crops(*test, configs()[MODELS[0]].image_size, TEST_BATCH):
            yield normalise(some.float()), named

    def watch(done: int, steps: int) -> None:
        if done * TESTS >= (len(tested[0]) + 1) * steps:
            for training, found in zip(trainings, tested, strict=True):
                found[done] = training.accuracy(tests())
            say(f"{done} of {steps} steps: {', '.join(f'{100 * found[done]:.1f} %' for found in tested)}")

    def finish(steps: int, seconds: float) -> list[Row]:
        rows = []
        for training, record, found in zip(trainings, records, tested, strict=True):
            state = halve(training.average.state_dict())
            training.average.load_state_dict(state)
            top1 = training.accuracy(tests())
            kept = {key: x for key, x in state.items() if not key.startswith("aux_head.")}
            save_model(options.out / record.model / "model.safetensors", kept, record)
            write_log(options.out / record.model / "log.csv", training, steps, found)
            size = sum(x.numel() for key, x in training.network.named_parameters() if key in kept)
            rows.append(
                dict(
                    model=record.model, top1=top1, tests=len(test[2]), steps=steps,
                    epochs=round(steps * training.config.batch_size / len(images), 2), parameters=size,
                    seconds=round(seconds, 1),
                )
            )  # fmt: skip
        return rows

    return Prepared(trainings, finish, watch)


def write_log(path: Path, training: CapturedTraining, steps: int, tested: dict[int, float]) -> None:
    """A row a step: its learning rate and loss, and what the average of the weights came to where it was tested."""
    rates, losses = training.rates[:steps].tolist(), training.losses[:steps].tolist()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "lr", "loss", "top1"))
        for step, (rate, loss) in enumerate(zip(rates, losses, strict=True), start=1):
            writer.writerow((step, f"{rate:.6g}", f"{loss:.5g}", tested.get(step, "")))


def main() -> None:
    """Decode, and train both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, minutes=3.0)
    options = parser.parse_args()
    end = time.time() + 60 * options.minutes
    if options.dry_run:
        os.environ[ENVIRONMENT_VARIABLE] = "torch"
    decoded = Path(tempfile.mkdtemp())
    save_decoded(Path(options.data), decoded, WHOLE, DRY_IMAGES if options.dry_run else None)
    jobs = [Job("imagenette", partial(prepare, options, decoded))]
    fleet = Fleet(
        options.out / "runs", end, options.at_a_time, steps=options.steps,
        most_steps=DRY_STEPS if options.dry_run else MOST_STEPS,
    )  # fmt: skip
    sys.exit(len(fleet.run(jobs)) < len(MODELS))


if __name__ == "__main__":
    main()
