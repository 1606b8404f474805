"""Detection: path, PIL image, array or tensor in, a typed result out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from overlock.deploy.inputs import ImageLike
from overlock.deploy.objects import find_objects
from overlock.deploy.results import Objects
from overlock.deploy.runtime import not_finite
from overlock.deploy.stream import ImagePredictor, Loaded
from overlock.tasks.detection import check_limits


class Detector(ImagePredictor[Objects]):
    """A detector that takes images as they come; see :class:`ImagePredictor` for its arguments.

    Example:
        >>> detector = Detector.from_checkpoint("runs/small_detect")  # doctest: +SKIP
        >>> detector("street.jpg").labels  # doctest: +SKIP
        ('Car', 'Car', 'Pedestrian')
    """

    task = "detect"
    batch_size = 1

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self, images: ImageLike, *, threshold: float = 0.5, max_detections: int | None = None,
        nms_iou: float | None = None, batch_size: int = 4,
    ) -> Objects: ...  # fmt: skip
    @overload
    def __call__(
        self, images: Iterable[ImageLike], *, threshold: float = 0.5, max_detections: int | None = None,
        nms_iou: float | None = None, batch_size: int = 4,
    ) -> list[Objects]: ...  # fmt: skip
    def __call__(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        threshold: float = 0.5,
        max_detections: int | None = None,
        nms_iou: float | None = None,
        batch_size: int = 4,
    ) -> Objects | list[Objects]:
        """Find objects.

        Args:
            images: one or several, as :class:`overlock.deploy.Predictor` takes them. The results keep them.
            threshold: score from which on an object counts.
            max_detections: objects of an image, the surest; the detector's own 100 unless given.
            nms_iou: overlap from which on, of two boxes of one class, the less sure one is left out; the detector's own
                0.5 unless given.
            batch_size: images a pass.

        Returns:
            The objects of one image, a list of them for several.

        Raises:
            ValueError: for an image that cannot be read, or a number that will not do.
        """
        result: Any = self._call(
            images, batch_size=batch_size, threshold=threshold, max_detections=max_detections, nms_iou=nms_iou
        )
        return result

    def _check(  # type: ignore[override]
        self, *, threshold: float = 0.5, max_detections: int | None = None, nms_iou: float | None = None
    ) -> dict[str, Any]:
        settings = dict(threshold=threshold, max_detections=max_detections, nms_iou=nms_iou)
        check_limits(**settings)  # type: ignore[arg-type]
        return settings

    def _prepare(self, image: Image.Image) -> Tensor:
        return pil_to_tensor(image)

    def _infer(self, images: Sequence[Loaded], settings: dict[str, Any]) -> list[Objects]:
        tensors = [one.tensor.to(self.device) / 255 for one in images]
        try:
            found = find_objects(self.network, tensors, **settings)
        except FloatingPointError:
            raise not_finite(self.precision) from None
        return [
            Objects(
                source=one.item.source, name=one.item.name, frame=one.item.frame, image=one.kept, size=one.size,
                classes=self.record.classes, class_ids=tuple(label - 1 for label in result["labels"].tolist()),
                scores=tuple(result["scores"].tolist()), boxes=tuple(map(tuple, result["boxes"].tolist())),
                masks=result.get("masks"),
            )
            for one, result in zip(images, found, strict=True)
        ]  # fmt: skip
