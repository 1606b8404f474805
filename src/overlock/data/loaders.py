"""Batches that depend on the seed, the epoch and the place alone, so that a run can go on from any step.

A batch of the run is shared out over its processes and, on each, over micro-batches. Which images it holds, in which
order, and how each is changed at random follows from (seed, epoch, place in the epoch): not from the number of
processes, nor from what was loaded before.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import RawValue
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from overlock.data.datasets import Draw, ImageDataset, Prepare, Sample, StreamDataset, derive_seed
from overlock.data.images import ImageSource
from overlock.data.readers import ImageStream

GRACE = 2.0  # seconds that a loading process has for the image at hand when its parent leaves
WATCH = 0.2  # seconds between its looks for its parent
PREFETCH = 2  # batches that each loading process keeps ready
Join = Callable[[list[tuple[Any, Any]]], tuple[Any, Any]]
"""From those to the images and the labels of a batch."""


class Batch(NamedTuple):
    """Images as the network takes them."""

    images: Any
    """(B, Cin, H, W), or a list of images (Cin, H, W) of several sizes."""
    labels: Any
    """One for each image: (B,) of classes, (B, H, W) of the pixels' classes, or a list."""
    unreadable: tuple[str, ...]
    """What could not be read, and why; in training another image stands in for it."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of each batch that one process takes."""

    rank: int = 0
    """Number of the process."""
    world: int = 1
    """Processes."""
    micro_batch: int
    """Images of one forward pass."""
    accumulate: int = 1
    """Forward passes of one step."""

    @property
    def batch_size(self) -> int:
        """Images of one step, over all processes."""
        return self.world * self.micro_batch * self.accumulate

    def places(self) -> list[list[int]]:
        """The places of a batch that each micro-batch of this process takes.

        Mixup joins the first image of a batch with the last, the second with the one before it, and so on. A process
        takes places from both ends, so that the same images are joined however many processes there are.
        """
        slice_size = self.world * self.micro_batch
        half, odd = divmod(self.micro_batch, 2)
        front = [self.rank * half + i for i in range(half)]
        middle = [self.world * half + self.rank] * odd
        local = [*front, *middle, *(slice_size - 1 - place for place in reversed(front))]
        return [[step * slice_size + place for place in local] for step in range(self.accumulate)]


class Order:
    """The images of an epoch: each once, as long as whole batches of them go, or in rounds where it is longer.

    Args:
        length: images there are.
        batch_size: images a step, over all processes.
        batches: steps of an epoch.
        repeats: versions of each image in an epoch.
        seed: of the run.
    """

    def __init__(self, length: int, batch_size: int, batches: int, *, repeats: int, seed: int):
        self.length, self.batch_size, self.batches = length, batch_size, batches
        self.repeats, self.seed = repeats, seed

    def indices(self, epoch: int) -> np.ndarray[Any, Any]:
        """(batches * batch_size,)"""
        generator = np.random.default_rng(derive_seed(self.seed, epoch))
        needed = self.batches * self.batch_size
        rounds: list[np.ndarray[Any, Any]] = []
        while sum(map(len, rounds)) < needed:
            rounds.append(generator.permutation(self.length).repeat(self.repeats))
        return np.concatenate(rounds)[:needed]


class _Draws:
    """A batch sampler: the draws of each micro-batch from a place in an epoch on."""

    def __init__(self, order: Order, share: Share):
        self.order, self.share = order, share
        self.epoch, self.first, self.salt = 0, 0, 0

    def __iter__(self) -> Iterator[list[Draw]]:
        indices, size = self.order.indices(self.epoch), self.order.batch_size
        for batch in range(self.first, self.order.batches):
            for places in self.share.places():
                yield [
                    Draw(
                        int(indices[batch * size + place]),
                        derive_seed(self.order.seed, self.epoch, batch * size + place, self.salt),
                    )
                    for place in places
                ]

    def __len__(self) -> int:
        return (self.order.batches - self.first) * self.share.accumulate


class OnImage:
    """A transform of the image alone, which leaves the label as it is."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self.transform = transform

    def __call__(self, image: Image.Image, label: Any) -> tuple[Tensor, Any]:
        return self.transform(image), label


def stack(samples: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Samples of one size as tensors."""
    images, labels = default_collate(samples)
    return images, labels


def as_lists(samples: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Samples of any size, side by side."""
    return [image for image, _ in samples], [label for _, label in samples]


def collate_training(samples: list[Sample], *, join: Join = stack) -> Batch:
    """A batch of its full size; an empty one where no image could be read for one of its places."""
    full = all(sample.content is not None for sample in samples)
    return collate_testing(samples if full else [sample._replace(content=None) for sample in samples], join=join)


def collate_testing(samples: list[Sample], *, join: Join = stack) -> Batch:
    """A batch of the readable images, perhaps of none."""
    good = [sample.content for sample in samples if sample.content is not None]
    bad = tuple(problem for sample in samples for problem in sample.unreadable)
    if not good:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), bad)
    return Batch(*join(good), bad)


WORKER_ERRORS = (RuntimeError, ConnectionError, EOFError)
"""What a loader raises where one of its processes is killed: while it waits for a batch, and while one is passed on."""


def lost_worker(error: Exception, mend: str) -> ValueError | None:
    """What to raise in place of a loader's error; None where that is not of a process that was lost.

    Args:
        error: one of ``WORKER_ERRORS``.
        mend: what to do: 'repeat the command, and with fewer --workers'.
    """
    if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
        return None
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(
        f"a process that loads images was lost, perhaps for want of memory; {mend} if it happens again ({reason})"
    )


class ImageLoader(DataLoader[Any]):
    """A DataLoader whose processes are gone when its batches are no longer wanted, whatever ends their use.

    Args:
        dataset: of images.
        settings: other arguments of DataLoader.
    """

    def __init__(self, dataset: Dataset[Any], **settings: Any):
        self.leaving = RawValue(ctypes.c_bool, False)
        super().__init__(dataset, worker_init_fn=partial(follow_the_parent, leaving=self.leaving), **settings)

    @contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        """The batches, for as long as this is entered.

        Left to itself the iterator lives as long as an error's traceback refers to it, and its processes with it.
        """
        self.leaving.value = False
        iterator = iter(self)
        try:
            yield iterator
        finally:
            self.leaving.value = True
            end = getattr(iterator, "_shutdown_workers", None)  # not where there are no processes
            if end is not None:
                end()


def follow_the_parent(_: int, *, leaving: Any) -> None:
    """Have a loading process live as long as its parent wants it.

    Ctrl-C and SIGTERM, which reach all processes of a job, are handled by the parent, which may have to end a step and
    save. When it is leaving, or is gone, this process ends without a word after the image at hand, or soon.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and not leaving.value:
            time.sleep(WATCH)
        time.sleep(GRACE)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


class TrainBatches:
    """The micro-batches of an epoch from any step on.

    Args:
        source: an :class:`ImageSource` or an :class:`ImageStream`.
        prepare: PIL image and label to what a batch is joined of, random.
        share: of this process.
        seed: of the run.
        join: prepared images and labels to those of a batch.
        epoch_steps: steps of an epoch; as many as there are whole batches of images unless given.
        repeats: versions of each image in an epoch.
        workers: loading processes; a stream needs at least one.
        pin_memory: make copies to a GPU fast.
    """

    def __init__(  # noqa: PLR0913 - keywords that go on to three parts
        self,
        source: ImageSource | ImageStream,
        prepare: Prepare,
        share: Share,
        *,
        seed: int,
        join: Join = stack,
        epoch_steps: int | None = None,
        repeats: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        self.share, self.seed = share, seed
        self.steps = epoch_steps or max(1, len(source) // share.batch_size)
        """Steps of an epoch."""
        common: dict[str, Any] = dict(
            collate_fn=partial(collate_training, join=join),
            pin_memory=pin_memory,
            prefetch_factor=PREFETCH if workers or isinstance(source, ImageStream) else None,
        )
        if isinstance(source, ImageStream):
            if repeats != 1:
                raise ValueError("augment.repeats is not available for images that are streamed; leave it at 1")
            self.draws = None
            self.stream = StreamDataset(source, prepare, seed=seed, batch_size=share.micro_batch, training=True)
            self.generator = torch.Generator()
            self.loader = ImageLoader(
                self.stream, batch_size=share.micro_batch, drop_last=True, num_workers=max(1, workers),
                generator=self.generator, **common,
            )  # fmt: skip
        else:
            order = Order(len(source), share.batch_size, self.steps, repeats=repeats, seed=seed)
            self.draws = _Draws(order, share)
            self.loader = ImageLoader(
                ImageDataset(source, prepare), batch_sampler=self.draws, num_workers=workers, **common,
            )  # fmt: skip

    def epoch(self, epoch: int, *, first: int = 0, salt: int = 0) -> Generator[Batch, None, None]:
        """The micro-batches of an epoch, from a step on.

        Args:
            epoch: its number.
            first: the step to begin with.
            salt: another number gives other random changes to the same images.
        """
        if self.draws is not None:
            self.draws.epoch, self.draws.first, self.draws.salt = epoch, first, salt
            with self.loader.batches() as loaded:
                yield from loaded
            return
        left = (self.steps - first) * self.share.accumulate
        skip = first * self.share.accumulate
        passes = 0
        while left > 0:
            self.stream.begin(epoch, passes, salt, skip)
            self.generator.manual_seed(derive_seed(self.seed, epoch, passes))
            before = left + skip
            with self.loader.batches() as loaded:
                for batch in loaded:
                    if skip > 0:
                        skip -= 1
                        continue
                    yield batch
                    left -= 1
                    if left == 0:
                        return
            if left + skip == before:
                raise ValueError(f"{self.stream.source}: no whole batch of images came; check the shards")
            passes += 1


def make_test_loader(
    source: ImageSource | ImageStream,
    prepare: Prepare,
    *,
    batch_size: int,
    join: Join = stack,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> ImageLoader:
    """Batches of each image once, shared out over the processes."""
    common: dict[str, Any] = dict(
        batch_size=batch_size, collate_fn=partial(collate_testing, join=join), pin_memory=pin_memory
    )
    if isinstance(source, ImageStream):
        stream = StreamDataset(source, prepare, seed=0, batch_size=batch_size, training=False)
        return ImageLoader(stream, num_workers=min(1, workers), **common)
    return ImageLoader(
        ImageDataset(source, prepare),
        sampler=range(rank, len(source), world),
        num_workers=workers,
        **common,
    )
