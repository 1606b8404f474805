"""Images one by one, read and prepared in the processes that load them; another stands in for an unreadable one."""

from __future__ import annotations

import hashlib
import random
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from overlock.data.images import ImageSource
from overlock.data.readers import ErrorNotes, ImageStream, as_rgb, check_label

STAND_INS = 100  # images tried in the place of an unreadable one
OTHERS = 2  # images that tell whether a fault is that of an image or of how all are prepared
# What transforms raise: of images that they were not made for, and of settings that cannot be.
_FAULTS = (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, OSError)
Prepare = Callable[[Image.Image, Any], tuple[Any, Any]]
"""From an image and its label to what a batch is joined of."""
Read = tuple[Any, Any, str] | str
"""Image, label and name, or why there are none."""


class Draw(NamedTuple):
    """An image to load."""

    place: int
    """Of the image in its source."""
    seed: int
    """Of its random changes."""


class Sample(NamedTuple):
    """What was loaded for a place of a batch."""

    content: tuple[Any, Any] | None
    """Image and label, prepared; None where nothing could be read."""
    unreadable: tuple[str, ...] = ()
    """What could not be read on the way, and why."""


def derive_seed(*numbers: int) -> int:
    """A seed of 63 bits from whole numbers."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_transforms(seed: int) -> None:
    """Seed the generators that random transforms draw from."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # timm draws from the global generator
    torch.default_generator.manual_seed(seed)


def prepare_image(
    prepare: Prepare, content: tuple[Any, Any], name: str, *, others: Iterable[tuple[Any, Any]], seed: int | None
) -> tuple[Any, Any] | str:
    """An image and its label, prepared; or, where that fails by the image's own fault, what is wrong with it.

    It is not the image's fault where the same random changes fail with other images too.

    Args:
        prepare: what does it.
        content: image and label.
        name: of the image, for messages.
        others: images and labels to try; asked for only after a failure.
        seed: of the random changes; None for none.

    Raises:
        ValueError: where no image can be prepared, naming this one.
    """

    def attempt(image: Any, label: Any) -> tuple[Any, Any]:
        if seed is not None:
            seed_transforms(seed)
        return prepare(image, label)

    def works(image: Any, label: Any) -> bool:
        try:
            attempt(image, label)
        except _FAULTS:
            return False
        return True

    try:
        return attempt(*content)
    except _FAULTS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        cause = error
    attempts = [works(*other) for other in islice(others, OTHERS)]
    if len(attempts) == OTHERS and not any(attempts):
        raise ValueError(
            f"{name}: the image cannot be prepared, nor can others ({reason}); check the settings of sizes and of "
            "random changes"
        ) from cause
    return f"{name}: the image cannot be prepared ({reason}); replace or remove the file"


class ImageDataset(Dataset[Sample]):
    """Images by number, or by :class:`Draw` for training, where another image stands in for an unreadable one.

    Which one follows from the draw's seed, so that it is the same in every process and when a run is resumed. An image
    that cannot be prepared by its own fault counts as unreadable.
    """

    def __init__(self, source: ImageSource, prepare: Prepare):
        self.source, self.prepare = source, prepare

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, draw: Draw | int) -> Sample:
        problems: list[str] = []
        seed = draw.seed if isinstance(draw, Draw) else None
        for place in self._places(draw) if isinstance(draw, Draw) else [draw]:
            try:
                content = self.source.read(place)
            except ValueError as error:
                problems.append(str(error))
                continue
            prepared = prepare_image(
                self.prepare, content, self.source.name(place), others=self._others(place), seed=seed
            )
            if not isinstance(prepared, str):
                return Sample(prepared, tuple(problems))
            problems.append(prepared)
        return Sample(None, tuple(problems))

    def _places(self, draw: Draw) -> Iterator[int]:
        """The place drawn, then those that stand in for it one after the other."""
        yield draw.place
        for attempt in range(1, STAND_INS + 1):
            yield derive_seed(draw.seed, attempt) % len(self.source)

    def _others(self, place: int) -> Iterator[tuple[Any, Any]]:
        """Other readable images, from anywhere."""
        for attempt in range(STAND_INS):
            other = derive_seed(place, attempt) % len(self.source)
            if other == place:
                continue
            try:
                yield self.source.read(other)
            except ValueError:
                continue


class StreamDataset(IterableDataset[Sample]):
    """The images of a stream; in training the next readable one stands in for those that cannot be read.

    Args:
        source: the stream.
        prepare: PIL image and label to what a batch is joined of.
        seed: of the run.
        batch_size: of the loader.
        training: shuffle, and go on without end where the reader does.
    """

    def __init__(self, source: ImageStream, prepare: Prepare, *, seed: int, batch_size: int, training: bool):
        self.source, self.prepare, self.seed = source, prepare, seed
        self.batch_size, self.training = batch_size, training
        self.start = (0, 0, 0, 0)

    def begin(self, epoch: int, passes: int, salt: int, skip: int) -> None:
        """Where the next iteration begins; the images of the first ``skip`` batches are not prepared."""
        self.start = (epoch, passes, salt, skip)

    def __iter__(self) -> Iterator[Sample]:
        epoch, passes, salt, skip = self.start
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)

        last: deque[Read] = deque(maxlen=10)

        def prepare(read: Read, place: int) -> Sample:
            return self._prepare(read, derive_seed(self.seed, epoch, passes, number, place, salt), last)

        waiting: list[int] = []  # places of unreadable images, for which the next readable one will stand in
        problems: list[str] = []
        for place, read in enumerate(self._read(number, workers)):
            last.append(read)
            # This process gives every so many-th batch of the loader.
            if (place // self.batch_size) * workers + number < skip:
                yield Sample((torch.empty(0), 0))
                continue
            sample = prepare(read, place)
            problems += sample.unreadable
            waiting.append(place)
            if sample.content is None and self.training and len(waiting) < STAND_INS:
                continue
            for earlier in waiting[:-1]:
                yield Sample(prepare(read, earlier).content)
            yield Sample(sample.content, tuple(problems))
            waiting, problems = [], []
        for place in waiting:  # at the end of the stream, where the last readable one stands in
            samples = (prepare(read, place) for read in reversed(last))
            content = next((sample.content for sample in samples if sample.content is not None), None)
            yield Sample(content, tuple(problems))
            problems = []

    def _read(self, number: int, workers: int) -> Iterator[Read]:
        """All that this process reads."""
        epoch, passes, _, _ = self.start
        reader = self.source.make_reader(training=self.training, batch_size=self.batch_size, seed=self.seed)
        reader.set_loader_cfg(num_workers=workers)
        reader.set_epoch(derive_seed(epoch, passes) % 2**31)
        errors = ErrorNotes()
        with errors.listening():
            for place, (image, label) in enumerate(reader):
                yield from errors.take()
                yield image, label, f"{self.source} image {place} of loader {number}"
            yield from errors.take()

    def _prepare(self, read: Read, seed: int, last: Iterable[Read]) -> Sample:
        try:
            content, name = self._decode(read)
        except ValueError as error:
            return Sample(None, (str(error),))
        prepared = prepare_image(
            self.prepare, content, name, others=self._others(read, last), seed=seed if self.training else None
        )
        return Sample(None, (prepared,)) if isinstance(prepared, str) else Sample(prepared)

    def _decode(self, read: Read) -> tuple[tuple[Image.Image, int], str]:
        """Image and label, and the name. Raises ValueError where there are none."""
        if isinstance(read, str):
            raise ValueError(read)
        image, label, name = read
        return (as_rgb(image, name), check_label(int(label), self.source.num_classes, name)), name

    def _others(self, read: Read, last: Iterable[Read]) -> Iterator[tuple[Any, Any]]:
        for other in last:
            if other is not read:
                try:
                    yield self._decode(other)[0]
                except ValueError:
                    continue
