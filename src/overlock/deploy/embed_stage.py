"""Embedding as a stage of Ray Data, on one machine or a cluster."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from overlock.data import read_image
from overlock.deploy.embedder import Embedder, Embedding
from overlock.deploy.inputs import Failure, ImageLike, Item, as_item
from overlock.deploy.runtime import Precision

Batch = dict[str, np.ndarray[Any, Any]]


class EmbedStage:
    """A callable class for :meth:`ray.data.Dataset.map_batches`: rows with an image become rows with its vector.

    The column of images is replaced by ``vector`` (D numbers in float32) and ``error``, which is empty where all went
    well. For an image that cannot be read, ``error`` says why, and the vector is all NaN.

    Args:
        checkpoint: a run's folder, a file of weights, 'hf-hub:USER/NAME' or the name of a model of timm's, that each
            node finds; the package's own network unless given.
        column: of the images: arrays as :func:`ray.data.read_images` gives them, encoded bytes as
            :func:`ray.data.read_binary_files` does, or paths.
        model: timm's name of the model, for a checkpoint that does not say.
        device: 'cpu', 'cuda' and so on; by default a GPU where Ray gives the worker one.
        precision: of the network's arithmetic: 'fp32', 'bf16' or 'fp16'.
        workers: threads of each worker that load images.

    Example:
        >>> images = ray.data.read_images("photos", include_paths=True)  # doctest: +SKIP
        >>> settings = dict(checkpoint="runs/photos")  # doctest: +SKIP
        >>> vectors = images.map_batches(  # doctest: +SKIP
        ...     EmbedStage, fn_constructor_kwargs=settings, batch_size=64, concurrency=2, num_gpus=1
        ... )

    Raises:
        ValueError: for a checkpoint, device or precision that will not do.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        column: str = "image",
        model: str | None = None,
        device: str | None = None,
        precision: Precision = "fp32",
        workers: int = 2,
    ):
        self.column, self.workers = column, workers
        if checkpoint is None:
            self.embedder = Embedder.default(device=device, precision=precision)
        else:
            self.embedder = Embedder.from_checkpoint(checkpoint, model=model, device=device, precision=precision)

    def __call__(self, batch: Batch) -> Batch:
        """A batch of columns, (B, ...) each, to the same without the images, with ``vector`` (B, D) and ``error``.

        Raises:
            ValueError: where the column of images is not there.
        """
        if self.column not in batch:
            raise ValueError(f"there is no column {self.column!r} of images, but {', '.join(batch)}; name it: column")
        images = batch[self.column]
        outcomes = list(
            self.embedder.stream(_decoded(images), batch_size=len(images), workers=self.workers, keep_images=False)
        )
        nothing = np.full(self.embedder.dim, np.nan, dtype=np.float32)
        vectors = [one.vector if isinstance(one, Embedding) else nothing for one in outcomes]
        errors = [one.reason if isinstance(one, Failure) else "" for one in outcomes]
        others = {name: values for name, values in batch.items() if name != self.column}
        return others | dict(vector=np.stack(vectors), error=np.array(errors, dtype=object))


def _decoded(images: Iterable[Any]) -> Iterator[ImageLike | Item | Failure]:
    """Arrays and paths as they are, encoded images read."""
    for number, image in enumerate(images):
        if not isinstance(image, bytes):
            yield image if isinstance(image, np.ndarray) else as_item(str(image))
            continue
        name = f"image {number} of the batch"
        try:
            yield Item(image=read_image(io.BytesIO(image), name=name), source=name, name=str(number))
        except ValueError as error:
            yield Failure(source=name, reason=str(error).removeprefix(f"{name}: "))
