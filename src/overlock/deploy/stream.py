"""Images through a network as they come: loaded ahead by threads, in batches, in their order, in constant memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from overlock.checkpoints import Record
from overlock.deploy.inputs import SINGLE, Failure, ImageLike, Item, as_item, as_pil
from overlock.deploy.models import load_network
from overlock.deploy.results import Result
from overlock.deploy.runtime import Precision, autocast_to, choose_device, inference_copy
from overlock.fused.meanwhile import without_waiting

if TYPE_CHECKING:
    from typing_extensions import Self

R = TypeVar("R", bound=Result)
T = TypeVar("T")
WORKERS = 2
Given = ImageLike | Item | Failure
"""What a stream is made of; a failure, say of a file that is not there, passes through."""


@dataclass(frozen=True)
class Loaded:
    """An image as it goes into the network."""

    item: Item
    size: tuple[int, int]
    """Height and width of the image."""
    tensor: Tensor
    """(C, H, W), prepared."""
    kept: Image.Image | None
    """What the result keeps of it."""


class ImagePredictor(Generic[R]):
    """A trained network that takes images as they come.

    Args:
        network: as :func:`overlock.checkpoints.load_model` gives it; it stays as it is.
        record: likewise.
        device: 'cpu', 'cuda' and so on; by default a GPU where there is one.
        precision: of the network's arithmetic: 'fp32', 'bf16' or 'fp16'.

    Raises:
        ValueError: for a network of another task, or of images that are neither grey nor coloured, a device that is
            not there, or another precision.
    """

    task: ClassVar[str]
    batch_size: ClassVar[int]
    """Images a pass, unless given."""

    def __init__(self, network: nn.Module, record: Record, *, device: str | None = None, precision: Precision = "fp32"):
        if record.task != self.task:
            raise ValueError(f"this is a {record.name}, of the task {record.task}, not {self.task}")
        if record.channels not in ((1, 3) if record.head is None else (3,)):
            raise ValueError(
                f"this is a {record.name} for images of {record.channels} channels, which files of images do not have; "
                f"load it with overlock.checkpoints.load_model and call the network itself"
            )
        self.record, self.precision, self.device = record, precision, choose_device(device)
        autocast_to(precision, self.device)
        self.network = inference_copy(network, record, self.device)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        model: str | None = None,
        device: str | None = None,
        precision: Precision = "fp32",
    ) -> Self:
        """Load a run's folder, 'hf-hub:USER/NAME', a file of weights, ours or the authors', or a model of timm's.

        See :func:`overlock.deploy.models.load_network`.

        Raises:
            ValueError: for a missing, damaged or foreign file, and one of another task.
        """
        return cls(*load_network(path, model=model), device=device, precision=precision)

    def stream(
        self,
        images: Iterable[Given],
        *,
        batch_size: int | None = None,
        workers: int = WORKERS,
        keep_images: bool = True,
        **settings: Any,
    ) -> Iterator[R | Failure]:
        """The results of any number of images, one by one and in their order, in constant memory.

        An image that cannot be read ends nothing: in its place comes a :class:`Failure`, which says why.

        Args:
            images: as :meth:`__call__` takes them, perhaps without end.
            batch_size: images a pass.
            workers: threads that load images while the network works; 0 loads them in between.
            keep_images: keep in each result what it can be drawn with.
            settings: the task's own, as :meth:`__call__` takes them.

        Raises:
            ValueError: for a setting that will not do.
        """
        size = self.batch_size if batch_size is None else batch_size
        for name, value, least in (("batch_size", size, 1), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if isinstance(images, SINGLE):
            raise ValueError("a stream takes many images; give one as [image], or call the predictor with it")
        return self._run(images, size, workers, keep_images, self._check(**settings))

    def _call(self, images: ImageLike | Iterable[ImageLike], **options: Any) -> Any:
        """One result for one image, a list for several; what cannot be read is an error here."""
        single = isinstance(images, SINGLE)
        results: list[R] = []
        for outcome in self.stream([images] if single else images, **options):  # type: ignore[list-item, arg-type]
            if isinstance(outcome, Failure):
                raise ValueError(outcome.sentence)
            results.append(outcome)
        return results[0] if single else results

    def _check(self, **settings: Any) -> dict[str, Any]:
        """The settings of the task, complete; ValueError for one that will not do."""
        raise NotImplementedError

    def _prepare(self, image: Image.Image) -> Tensor:
        """From a whole image as RGB to (C, H, W)."""
        raise NotImplementedError

    def _keep(self, image: Image.Image) -> Image.Image:
        """What a result keeps of an image."""
        return image

    def _infer(self, images: Sequence[Loaded], settings: dict[str, Any]) -> list[R]:
        """The results of a batch; ValueError where numbers are not finite."""
        raise NotImplementedError

    def _run(
        self, images: Iterable[Given], size: int, workers: int, keep: bool, settings: dict[str, Any]
    ) -> Iterator[R | Failure]:
        loaded = _ahead(lambda image: self._load(image, keep), images, workers=workers, count=max(size, workers))
        while batch := list(islice(loaded, size)):
            good = [one for one in batch if isinstance(one, Loaded)]
            results = iter(self._guarded(good, settings))
            for one in batch:
                yield next(results) if isinstance(one, Loaded) else one

    def _load(self, given: Given, keep: bool) -> Loaded | Failure:
        if isinstance(given, Failure):
            return given
        item = as_item(given)
        try:
            image = as_pil(item.image)
            kept = self._keep(image) if keep else None
            return Loaded(item, (image.height, image.width), self._prepare(image), kept)
        except (ValueError, MemoryError) as error:
            return _fail(item, str(error) or "there is not enough memory for this image")

    @torch.inference_mode()
    def _guarded(self, images: Sequence[Loaded], settings: dict[str, Any]) -> Sequence[R | Failure]:
        """The results of a batch; of each image by itself where the batch is too much."""
        if not images:
            return []
        try:
            with autocast_to(self.precision, self.device), without_waiting(self.network):
                return self._infer(images, settings)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            reason = f"there is not enough memory on {self.device} for its {_pixels(images)} pixels; make it smaller"
        except ValueError as error:
            reason = str(error)
        if len(images) > 1:
            return [result for one in images for result in self._guarded([one], settings)]
        return [_fail(images[0].item, reason)]


def _fail(item: Item, reason: str) -> Failure:
    return Failure(source=item.source, reason=reason.removeprefix(f"{item.source}: "), frame=item.frame)


def _out_of_memory(error: BaseException) -> bool:
    told = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or ("memory" in told and "alloc" in told)


def _pixels(images: Sequence[Loaded]) -> str:
    return " x ".join(map(str, images[0].size))


def _ahead(work: Callable[[Given], T], items: Iterable[Given], *, workers: int, count: int) -> Iterator[T]:
    """Work on items in threads, a number of items ahead of what is asked for, in their order."""
    if workers == 0:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="overlock-load")
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
