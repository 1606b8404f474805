"""What predictors give: the result of an image, which can be drawn, also where the image was no file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from overlock.deploy.inputs import as_pil
from overlock.drawing import draw_labels, draw_legend, draw_objects, join_pictures
from overlock.tasks.masks import Masks


@dataclass(frozen=True, kw_only=True)
class Result:
    """What all results have."""

    source: str
    """The image's path, or what it was given as."""
    name: str = "image"
    """Of files for this result: a path within a folder of results, without an ending."""
    frame: int | None = None
    """The image's number in a video, from 0 on."""
    image: Image.Image | None = field(default=None, repr=False, compare=False)
    """What was seen, as RGB, unless the predictor was told not to keep it: of detectors and segmenters the image, of
    classifiers a small copy."""

    def picture(self) -> Image.Image:
        """The image, read anew where it was not kept.

        Raises:
            ValueError: where it cannot be.
        """
        return as_pil(self.source) if self.image is None else self.image


@dataclass(frozen=True, kw_only=True)
class Prediction(Result):
    """The best classes of an image."""

    labels: tuple[str, ...]
    """Names of the classes, the most probable first."""
    probabilities: tuple[float, ...]
    """Theirs, of all classes' sum 1."""


@dataclass(frozen=True, kw_only=True)
class Objects(Result):
    """What was found in an image, the surest first."""

    size: tuple[int, int]
    """Height and width of the image in pixels."""
    classes: tuple[str, ...]
    """Names of all classes that the detector knows."""
    class_ids: tuple[int, ...]
    """The objects' classes, counted from 0 in those."""
    scores: tuple[float, ...]
    """Of 0 to 1."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """Left, top, right, bottom in pixels."""
    masks: Masks | None = None
    """From detectors that give masks: like an array (N, H, W) of booleans, each mask decoded when it is asked for."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the objects' classes."""
        return tuple(self.classes[class_id] for class_id in self.class_ids)

    @property
    def places(self) -> tuple[int, ...]:
        """An earlier name of :attr:`class_ids`."""
        return self.class_ids

    def draw(self) -> Image.Image:
        """The image with boxes, names, scores and masks."""
        objects: dict[str, Any] = dict(
            boxes=self.boxes, labels=[class_id + 1 for class_id in self.class_ids], scores=self.scores
        )  # fmt: skip
        if self.masks is not None:
            objects["masks"] = self.masks
        return draw_objects(self.picture(), objects, self.classes)


@dataclass(frozen=True, kw_only=True)
class LabelMap(Result):
    """The class of each pixel of an image."""

    labels: np.ndarray[Any, Any]
    """(H, W), classes counted from 0."""
    classes: tuple[str, ...]
    """Their names."""

    def shares(self) -> dict[str, float]:
        """Of the image's pixels, by the classes in it, the largest first."""
        return {self.classes[place]: share for place, share in self._shares()}

    def draw(self, *, legend: bool = True) -> Image.Image:
        """The image with its pixels in their classes' colours, perhaps with the names beside."""
        image = self.picture()
        picture = draw_labels(image, self.labels, self.classes)
        if not legend:
            return picture
        shown = [place for place, _ in self._shares()]
        return join_pictures([[picture, draw_legend(self.classes, shown, height=image.height)]])

    def as_image(self) -> Image.Image:
        """The labels as a grey image, of 8 bits where they go into them, else of 16."""
        return Image.fromarray(self.labels.astype(np.uint8 if len(self.classes) <= 256 else np.uint16))

    def _shares(self) -> list[tuple[int, float]]:
        counts = np.bincount(self.labels.ravel())
        order = np.argsort(-counts, kind="stable")
        return [(int(i), float(counts[i] / self.labels.size)) for i in order if counts[i]]
