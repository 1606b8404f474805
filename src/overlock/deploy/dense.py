"""Detection and segmentation: path, PIL image, array or tensor in, a typed result out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.functional import pil_to_tensor

from overlock.checkpoint import Record, load_model
from overlock.data.dense_transforms import make_segmentation_transform
from overlock.deploy.predict import ImageLike, as_pil, name_of
from overlock.fused.fuse import fuse
from overlock.fused.meanwhile import without_waiting
from overlock.hub import find_weights
from overlock.tasks.detection import find_objects
from overlock.tasks.sliding import segment

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Objects:
    """What was found in an image, the surest first."""

    source: str
    """The image's path, or what it was given as."""
    size: tuple[int, int]
    """Height and width of the image in pixels."""
    labels: tuple[str, ...]
    """Names of the objects' classes."""
    scores: tuple[float, ...]
    """Of 0 to 1."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """Left, top, right, bottom in pixels."""
    masks: np.ndarray[Any, Any] | None = None
    """(N, H, W) of booleans, from detectors that give masks."""


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """The class of each pixel of an image."""

    source: str
    """The image's path, or what it was given as."""
    labels: np.ndarray[Any, Any]
    """(H, W), places in the classes."""
    classes: tuple[str, ...]
    """Their names."""

    def shares(self) -> dict[str, float]:
        """Of the image's pixels, by the classes in it, the largest first."""
        places, counts = np.unique(self.labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {self.classes[places[i]]: float(counts[i] / self.labels.size) for i in order}


class _DensePredictor:
    """A trained network of a task, fused for speed.

    Args:
        network: as :func:`overlock.checkpoint.load_model` gives it.
        record: likewise.
        device: 'cpu', 'cuda' and so on; by default a GPU where there is one.

    Raises:
        ValueError: for a network of another task.
    """

    task: str

    def __init__(self, network: nn.Module, record: Record, *, device: str | None = None):
        if record.task != self.task:
            raise ValueError(f"this is a {record.name}, of the task {record.task}, not {self.task}")
        self.record = record
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network = fuse(network.to(self.device))

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike[str], *, model: str | None = None, device: str | None = None
    ) -> Self:
        """Load a run's folder, 'hf-hub:USER/NAME', a file of ours or the authors' weights.

        See :func:`overlock.checkpoint.load_model`.

        Raises:
            ValueError: for a missing, damaged or foreign file, and one of another task.
        """
        return cls(*load_model(find_weights(path), model=model), device=device)


class Detector(_DensePredictor):
    """A detector that takes images as they come; see :class:`_DensePredictor` for its arguments.

    Example:
        >>> detector = Detector.from_checkpoint("runs/small_detect")  # doctest: +SKIP
        >>> detector(["street.jpg"])[0].labels  # doctest: +SKIP
        ('Car', 'Car', 'Pedestrian')
    """

    task = "detect"

    @torch.inference_mode()
    def __call__(self, images: Sequence[ImageLike], *, threshold: float = 0.5, batch_size: int = 4) -> list[Objects]:
        """Find objects.

        Args:
            images: as :class:`overlock.deploy.Predictor` takes them.
            threshold: score from which on an object counts.
            batch_size: images a pass.

        Raises:
            ValueError: for an image that cannot be read, or a threshold outside 0 to 1.
        """
        if not 0 <= threshold <= 1 or batch_size < 1:
            raise ValueError(f"threshold must be in 0 to 1, batch_size at least 1, got {threshold} and {batch_size}")
        found: list[Objects] = []
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            tensors = [(pil_to_tensor(as_pil(image)) / 255).to(self.device) for image in part]
            with without_waiting(self.network):
                results = find_objects(self.network, tensors)
            found += [self._read(*one, threshold) for one in zip(part, tensors, results, strict=True)]
        return found

    def _read(self, image: ImageLike, tensor: Tensor, result: dict[str, Tensor], threshold: float) -> Objects:
        kept = {name: part[result["scores"] >= threshold].cpu() for name, part in result.items()}
        return Objects(
            source=name_of(image),
            size=(tensor.shape[1], tensor.shape[2]),
            labels=tuple(self.record.classes[label - 1] for label in kept["labels"].tolist()),
            scores=tuple(kept["scores"].tolist()),
            boxes=tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in kept["boxes"].tolist()),
            masks=kept["masks"].numpy() if "masks" in kept else None,
        )


class Segmenter(_DensePredictor):
    """A segmenter that takes images as they come; see :class:`_DensePredictor` for its arguments.

    Example:
        >>> segmenter = Segmenter.from_checkpoint("runs/small_segment")  # doctest: +SKIP
        >>> segmenter(["street.jpg"])[0].shares()  # doctest: +SKIP
        {'Road': 0.41, 'Building': 0.3, 'Sky': 0.2, 'Car': 0.09}
    """

    task = "segment"

    def __init__(self, network: nn.Module, record: Record, *, device: str | None = None):
        super().__init__(network, record, device=device)
        self.transform = make_segmentation_transform(training=False, scale=record.preprocessing["scale"])

    @torch.inference_mode()
    def __call__(self, images: Sequence[ImageLike], **testing: Any) -> list[LabelMap]:
        """Segment, image by image.

        Args:
            images: as :class:`overlock.deploy.Predictor` takes them.
            testing: scales, flip, window and stride, as :func:`overlock.tasks.sliding.segment` takes them.

        Raises:
            ValueError: for an image that cannot be read, or such an argument that will not do.
        """
        maps = []
        for image in images:
            pixels = as_pil(image)
            prepared = self.transform(tv_tensors.Image(pil_to_tensor(pixels))).as_subclass(Tensor)
            size = (pixels.height, pixels.width)
            with without_waiting(self.network):
                shares = segment(self.network, prepared[None].to(self.device), size=size, **testing)
            labels = shares[0].argmax(dim=0).cpu().numpy()
            maps.append(LabelMap(source=name_of(image), labels=labels, classes=self.record.classes))
        return maps
