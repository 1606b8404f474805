"""Embeddings: an image in, the vector that a network sees it as out."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from overlock.checkpoints import Record, default_preprocessing
from overlock.data import make_eval_transform
from overlock.deploy.classify import DEFAULT_FILE
from overlock.deploy.inputs import ImageLike
from overlock.deploy.results import Result
from overlock.deploy.runtime import Precision, autocast_to, not_finite
from overlock.deploy.stream import ImagePredictor, Loaded
from overlock.fused.meanwhile import without_waiting
from overlock.tasks.features import find_backbone


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding(Result):
    """An image as a vector."""

    vector: np.ndarray[Any, Any]
    """(D,), float32, of any length."""
    size: tuple[int, int]
    """Width and height of the image in pixels."""


class Pooled(nn.Module):
    """A network's features as one vector an image: (B, Cin, H, W) to (B, D).

    Args:
        network: to (B, D) already, to maps (B, D, H, W) or tokens (B, N, D), or to a list of maps, whose last is taken.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features = self.network(images)
        if isinstance(features, (list, tuple)):
            features = features[-1]
        return features if features.dim() == 2 else features.mean(1) if features.dim() == 3 else features.mean((2, 3))


def make_extractor(network: nn.Module, record: Record) -> tuple[Pooled, Record]:
    """The network without its head, and the record of what remains.

    Of a classifier this is what its last layer takes: OverLoCK's pooled hidden layer, and likewise in other models of
    timm's. Of a detector or segmenter it is the mean of the backbone's coarsest map; images are prepared as those of
    its backbone's classifier.

    Args:
        network: as :func:`overlock.deploy.models.load_network` gives it; it stays as it is.
        record: likewise.

    Raises:
        ValueError: for a network whose classifier cannot be taken off.
    """
    if record.head is not None:
        preprocessing = default_preprocessing(record.model, in_chans=record.channels)
        arguments = {"in_chans": record.channels}
        bare = replace(record, head=None, classes=(), model_args=arguments, preprocessing=preprocessing)
        return Pooled(copy.deepcopy(find_backbone(network))).eval(), bare
    headless: Any = copy.deepcopy(network)
    if not hasattr(headless, "reset_classifier"):
        raise ValueError(f"{record.name}: its classifier cannot be taken off (it has no reset_classifier)")
    headless.reset_classifier(0)
    return Pooled(headless).eval(), replace(record, classes=())


def digest_of(network: nn.Module) -> str:
    """Tells the weights of a network from all others: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Embedder(ImagePredictor[Embedding]):
    """A network that gives a vector for each image; see :class:`ImagePredictor` for its arguments.

    Any classifier, detector or segmenter will do, also models of timm's; :func:`make_extractor` takes off its head.

    Example:
        >>> embedder = Embedder.from_checkpoint("runs/photos")  # doctest: +SKIP
        >>> embedder("examples/photos/cat.jpg").vector.shape  # doctest: +SKIP
        (1024,)
    """

    task = "classify"
    batch_size = 32

    def __init__(self, network: nn.Module, record: Record, *, device: str | None = None, precision: Precision = "fp32"):
        extractor, bare = make_extractor(network, record)
        self.digest = digest_of(extractor)
        super().__init__(extractor, bare, device=device, precision=precision)
        self.transform = make_eval_transform(bare.preprocessing)

    @classmethod
    def default(cls, *, device: str | None = None, precision: Precision = "fp32") -> Embedder:
        """The network that comes with the package, trained on CIFAR-10."""
        return cls.from_checkpoint(DEFAULT_FILE, device=device, precision=precision)

    @cached_property
    def dim(self) -> int:
        """Length of a vector."""
        with without_waiting(self.network):
            return self.embed(torch.zeros(1, *self.record.preprocessing["input_size"])).shape[1]

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self, images: ImageLike, *, batch_size: int = 32, keep_images: bool = False
    ) -> Embedding: ...
    @overload
    def __call__(
        self, images: Iterable[ImageLike], *, batch_size: int = 32, keep_images: bool = False
    ) -> list[Embedding]: ...
    def __call__(
        self, images: ImageLike | Iterable[ImageLike], *, batch_size: int = 32, keep_images: bool = False
    ) -> Embedding | list[Embedding]:
        """Embed one or several images, each in any form that :meth:`overlock.deploy.Predictor.__call__` takes.

        Raises:
            ValueError: for an image that cannot be read, or values or a shape that an image does not have.
        """
        result: Any = self._call(images, batch_size=batch_size, keep_images=keep_images)
        return result

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Prepared images (B, C, H, W) to vectors (B, D), float32 on the device, which need not have ended there."""
        with autocast_to(self.precision, self.device):
            return self.network(images.to(self.device, non_blocking=True)).float()

    def _check(self) -> dict[str, Any]:  # type: ignore[override]
        return {}

    def _prepare(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    def _infer(self, images: Sequence[Loaded], _: dict[str, Any]) -> list[Embedding]:
        vectors = self.network(torch.stack([one.tensor for one in images]).to(self.device)).float().cpu()
        if not vectors.isfinite().all():
            raise not_finite(self.precision)
        return [
            Embedding(
                source=one.item.source, name=one.item.name, frame=one.item.frame, image=one.kept, vector=vector,
                size=one.size[::-1],
            )
            for one, vector in zip(images, vectors.numpy(), strict=True)
        ]  # fmt: skip
