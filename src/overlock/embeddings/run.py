"""Embedding many images: read ahead by other processes, written shard by shard, gone on with where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from overlock.data.datasets import ImageDataset, Sample
from overlock.data.loaders import PREFETCH, WORKER_ERRORS, ImageLoader, lost_worker
from overlock.deploy.embedder import Embedder
from overlock.deploy.evaluate_classification import measure_speed
from overlock.deploy.runtime import not_finite
from overlock.embeddings.processes import Process
from overlock.embeddings.shards import PARTIAL, PATTERN, Origin, Row, Vectors, read_origin, read_problems, write_shard
from overlock.embeddings.sources import ImageList
from overlock.settings import check_number


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How images are embedded.

    Raises:
        ValueError: for numbers that will not do.
    """

    batch_size: int = 64
    """Images a pass."""
    shard_images: int = 4096
    """Images a file."""
    workers: int = 2
    """Processes that load images."""
    overwrite: bool = False
    """Replace shards of another network or of other images."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("shard_images", 1), ("workers", 0)):
            check_number(name, getattr(self, name), least)
        if self.shard_images % self.batch_size:
            near = max(1, self.shard_images // self.batch_size) * self.batch_size
            raise ValueError(
                f"shard_images {self.shard_images} must be a multiple of batch_size {self.batch_size}, so that a shard "
                f"is whole batches; give {near}"
            )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of it, in this process."""

    origin: Origin
    shards: int
    """Written now."""
    kept: int
    """There already."""
    own_images: int
    """In the shards of both kinds."""
    images: int
    """Embedded now."""
    failures: tuple[str, ...]
    """Images without a vector, and why: of the shards written now."""
    kept_failures: tuple[str, ...]
    """Likewise, of those that were there already."""
    seconds: float
    """From the first image to the last file."""
    bare_speed: float
    """Images a second through the network alone, the batches at hand; NaN where nothing was left to do."""

    @property
    def speed(self) -> float:
        """Images a second, from files to files."""
        return (self.images + len(self.failures)) / self.seconds if self.seconds else float("nan")


class _Batch(NamedTuple):
    """Prepared images with their places in a shard's order."""

    images: Tensor | None
    """(B, C, H, W) of those that could be read; None where none could."""
    sizes: list[tuple[int, int] | None]
    """Width and height of each; None for an unreadable one."""
    errors: list[str | None]


class _Prepare:
    """From an image to the network's input and the image's size."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self.transform = transform

    def __call__(self, image: Image.Image, _: Any) -> tuple[Tensor, tuple[int, int]]:
        return self.transform(image), image.size


def _collate(samples: list[Sample]) -> _Batch:
    good = [sample.content[0] for sample in samples if sample.content is not None]
    return _Batch(
        images=torch.stack(good) if good else None,
        sizes=[None if sample.content is None else sample.content[1] for sample in samples],
        errors=[None if sample.content is not None else " ".join(sample.unreadable) for sample in samples],
    )


def make_origin(embedder: Embedder, images: ImageList, checkpoint: str | None, options: EmbedOptions) -> Origin:
    """What the embeddings will say that they were made from."""
    return Origin(
        source=str(images.root.absolute()), images=len(images), digest=images.digest(), checkpoint=checkpoint,
        model=embedder.record.model, weights=embedder.digest, preprocessing=dict(embedder.record.preprocessing),
        precision=embedder.precision, dim=embedder.dim,
        batch_size=options.batch_size, shard_images=options.shard_images,
    )  # fmt: skip


def find_missing(folder: Path, origin: Origin, *, process: Process, overwrite: bool) -> list[int]:
    """The shards that a process has yet to write; files that an interrupted write left are written anew.

    Raises:
        ValueError: for a folder with embeddings of another origin, unless these are to be replaced.
    """
    if not overwrite:
        refuse_others(folder, origin, set())
    elif process.rank == 0:
        names = {origin.path(folder, shard).name for shard in range(origin.shards)}
        for path in folder.glob(PATTERN):
            if path.name not in names:
                path.unlink(missing_ok=True)
    own = range(process.rank, origin.shards, process.world)
    missing = {
        origin.path(folder, shard).name: shard for shard in own if not _is_done(origin.path(folder, shard), origin)
    }
    for path in folder.glob(PARTIAL):
        if path.stem.removeprefix(".") in missing:
            path.unlink(missing_ok=True)
    return list(missing.values())


def refuse_others(folder: Path, origin: Origin, known: set[Path]) -> None:
    """Raise ValueError where shards of a folder, but for those known before, are of another origin."""
    for path in sorted(set(folder.glob(PATTERN)) - known):
        known.add(path)
        found = read_origin(path)
        if found is not None and (changed := origin.differing(found)):
            raise ValueError(
                f"{path}: these embeddings were made with another {', '.join(changed)}; choose another --out, repeat "
                "the command that made them, or pass --overwrite to replace them"
            )


def _is_done(path: Path, origin: Origin) -> bool:
    found = read_origin(path) if path.is_file() else None
    return found is not None and not origin.differing(found)


def embed(
    embedder: Embedder, images: ImageList, folder: Path, origin: Origin, options: EmbedOptions, *,
    process: Process, tell: Callable[[str], object], watch: Callable[[Iterator[Any], int], Iterator[Any]],
) -> Report:  # fmt: skip
    """Write the shards of this process that are not there yet.

    Vectors depend on their batch alone, and batches on the images: so files are the same however often the work was
    interrupted, and however many processes share it.

    Args:
        embedder: the network.
        images: to embed.
        folder: for the shards.
        origin: of :func:`make_origin`.
        options: the same.
        process: this one.
        tell: called with a sentence on each image that has no vector.
        watch: passes the batches through, of which there are so many: for a progress bar.

    Raises:
        ValueError: where a shard cannot be written, another run, which began meanwhile, writes others here, or a
            process that loads images was lost.
    """
    missing = find_missing(folder, origin, process=process, overwrite=options.overwrite)
    kept = sorted({*range(process.rank, origin.shards, process.world)} - {*missing})
    places = {shard: list(origin.batches(shard)) for shard in missing}
    loader = ImageLoader(
        ImageDataset(images, _Prepare(embedder.transform)), batch_sampler=list(chain(*places.values())),
        num_workers=options.workers, collate_fn=_collate, pin_memory=embedder.device.type == "cuda",
        prefetch_factor=PREFETCH if options.workers else None,
    )  # fmt: skip
    failures: list[str] = []
    seen: set[Path] = set()
    example: Tensor | None = None
    started = time.perf_counter()
    with telling_of_lost_workers(), loader.batches() as loaded:
        batches = watch(loaded, len(loader))  # type: ignore[arg-type]
        for shard in missing:
            rows: list[Row] = []
            for place in places[shard]:
                batch: Any = next(batches)
                example = batch.images if example is None else example
                rows += _rows(embedder, images, place, batch)
            problems = [f"{row.id}: {row.error}" for row in rows if row.error is not None]
            failures += problems
            for problem in problems:
                tell(problem)
            if not options.overwrite:
                refuse_others(folder, origin, seen)
            write_shard(origin.path(folder, shard), rows, origin)
        next(batches, None)  # which ends the progress bar
    seconds = time.perf_counter() - started
    count, kept_count = (sum(map(origin.length, shards)) for shards in (missing, kept))
    return Report(
        origin=origin, shards=len(missing), kept=len(kept), own_images=count + kept_count,
        images=count - len(failures), failures=tuple(failures),
        kept_failures=tuple(chain(*(read_problems(origin.path(folder, shard)) for shard in kept))),
        seconds=seconds, bare_speed=_bare_speed(embedder, example, seconds),
    )  # fmt: skip


@contextmanager
def telling_of_lost_workers() -> Iterator[None]:
    """Inside, the errors of a loading process that was killed, also while it passed a batch on, become a ValueError."""
    try:
        yield
    except WORKER_ERRORS as error:
        raise lost_worker(error, "repeat the command, and with fewer --workers") or error from None


def _bare_speed(embedder: Embedder, images: Tensor | None, seconds: float) -> float:
    """Images a second through the network alone, measured in a tenth of the run's time at most; NaN of none."""
    if images is None:
        return float("nan")
    return measure_speed(embedder.embed, images.to(embedder.device), seconds=min(1.0, seconds / 10))


def _rows(embedder: Embedder, images: ImageList, places: Sequence[int], batch: _Batch) -> list[Row]:
    """The rows of a batch."""
    vectors = iter(_vectors(embedder, batch.images))
    rows: list[Row] = []
    for place, size, error in zip(places, batch.sizes, batch.errors, strict=True):
        entry, vector, reason = images[place], None, error and error.removeprefix(f"{images.name(place)}: ")
        if error is None:
            vector = next(vectors)
            if not np.isfinite(vector).all():
                vector, reason = None, str(not_finite(embedder.precision))
        rows.append(Row(id=entry.id, label=entry.label, size=size, vector=vector, error=reason))
    return rows


def _vectors(embedder: Embedder, images: Tensor | None) -> Vectors:
    """(B, D) of prepared images (B, C, H, W); of none where there are none.

    Raises:
        ValueError: where there is not enough memory for so many at once.
    """
    if images is None:
        return np.empty((0, 0), dtype=np.float32)
    try:
        return embedder.embed(images).cpu().numpy()
    except torch.OutOfMemoryError:
        raise ValueError(
            f"{embedder.device} has not enough memory for {len(images)} images of {tuple(images.shape[1:])}; give a "
            "smaller --batch_size"
        ) from None
