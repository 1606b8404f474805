"""Prediction: path, PIL image, array or tensor in, a typed result out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from overlock.checkpoint import Record, load_classifier
from overlock.data import make_eval_transform, read_image, to_rgb
from overlock.fused.fuse import fuse
from overlock.fused.meanwhile import without_waiting
from overlock.hub import find_weights
from overlock.network import VARIANTS

DEFAULT_FILE = Path(__file__).parent / "assets" / "overlock_atto_cifar10.safetensors"
"""The weights that come with the package, trained on CIFAR-10."""
ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The best classes of an image."""

    source: str
    """The image's path, or what it was given as."""
    labels: tuple[str, ...]
    """Names of the classes, the most probable first."""
    probabilities: tuple[float, ...]
    """Theirs, of all classes' sum 1."""


class Predictor:
    """A trained network, fused for speed, that takes images as they come.

    Args:
        network: images (B, Cin, H, W) to logits (B, classes).
        record: its classes and preprocessing.
        device: 'cpu', 'cuda' and so on; by default a GPU where there is one.

    Example:
        >>> predictor = Predictor.default()  # doctest: +SKIP
        >>> predictor("examples/photos/cat.jpg").labels[0]  # doctest: +SKIP
        'cat'
    """

    def __init__(self, network: nn.Module, record: Record, *, device: str | None = None):
        self.record = record
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network = fuse(network) if record.model in VARIANTS else network.eval()
        self.network = network.to(self.device)
        self.transform = make_eval_transform(record.preprocessing)

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike[str], *, model: str | None = None, device: str | None = None
    ) -> Predictor:
        """Load a run's folder, 'hf-hub:USER/NAME', a file of ours or the authors' weights.

        See :func:`overlock.checkpoint.load_classifier`.

        Raises:
            ValueError: for a missing, damaged or foreign file.
        """
        return cls(*load_classifier(find_weights(path), model=model), device=device)

    @classmethod
    def default(cls, *, device: str | None = None) -> Predictor:
        """The network that comes with the package: ``overlock_atto`` for the ten classes of CIFAR-10.

        Whatever an image shows is given one of those ten names.
        """
        return cls.from_checkpoint(DEFAULT_FILE, device=device)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self, images: ImageLike, *, top: int = 5, batch_size: int = 32
    ) -> Prediction: ...
    @overload
    def __call__(self, images: Sequence[ImageLike], *, top: int = 5, batch_size: int = 32) -> list[Prediction]: ...
    def __call__(
        self, images: ImageLike | Sequence[ImageLike], *, top: int = 5, batch_size: int = 32
    ) -> Prediction | list[Prediction]:
        """Classify.

        Args:
            images: one or a sequence of: path; PIL image; array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or tensor
                (1, H, W), (3, H, W) or (4, H, W); both uint8 of 0 to 255, or floats of 0 to 1.
            top: how many classes; all where there are fewer.
            batch_size: images a pass.

        Returns:
            A prediction for one image, a list of them for a sequence.

        Raises:
            ValueError: for an image that cannot be read, or values or a shape that an image does not have.
        """
        if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray, Tensor)):
            return self([images], top=top, batch_size=batch_size)[0]
        if top < 1 or batch_size < 1:
            raise ValueError(f"top and batch_size must be at least 1, got {top} and {batch_size}")
        predictions: list[Prediction] = []
        for start in range(0, len(images), batch_size):
            predictions += self._predict(images[start : start + batch_size], top)
        return predictions

    @torch.inference_mode()
    def _predict(self, images: Sequence[ImageLike], top: int) -> list[Prediction]:
        inputs = torch.stack([self.transform(as_pil(image)) for image in images]).to(self.device)
        with without_waiting(self.network):
            logits = self.network(inputs)
        probabilities = logits.float().softmax(dim=1).cpu()
        values, places = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
        return [
            Prediction(
                source=name_of(image),
                labels=tuple(self.record.classes[place] for place in row.tolist()),
                probabilities=tuple(value.tolist()),
            )
            for image, value, row in zip(images, values, places, strict=True)
        ]


def as_pil(image: ImageLike) -> Image.Image:
    """Any accepted image as 8-bit RGB.

    Raises:
        ValueError: for what is no image.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, Tensor):
        if image.dim() != 3:
            raise ValueError(f"an image tensor must be (C, H, W), got {tuple(image.shape)}; give a batch as a list")
        return to_rgb(_array_to_pil(image.detach().cpu().permute(1, 2, 0).numpy()))
    if isinstance(image, np.ndarray):
        return to_rgb(_array_to_pil(image))
    raise ValueError(f"an image must be a path, a PIL image, an array or a tensor, got {type(image).__name__}")


def _array_to_pil(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"an image array must be (H, W) or (H, W, C) with 1, 3 or 4 channels, got {array.shape}")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"an image must hold uint8 of 0 to 255 or floats of 0 to 1, got {array.dtype}")
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"a floating-point image must lie in 0 to 1, got {array.min():.3g} to {array.max():.3g}")
        array = (array.astype(np.float32) * 255).round().astype(np.uint8)
    return to_pil_image(np.ascontiguousarray(array))


def name_of(image: ImageLike) -> str:
    return str(image) if isinstance(image, (str, os.PathLike)) else f"<{type(image).__name__}>"
