"""Detection and segmentation: path, PIL image, array or tensor in, a typed result out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.functional import pil_to_tensor

from overlock.checkpoint import Record
from overlock.data.dense_transforms import make_segmentation_transform
from overlock.deploy.inputs import ImageLike
from overlock.deploy.machine import Precision, not_finite
from overlock.deploy.results import LabelMap, Objects
from overlock.deploy.stream import ImagePredictor, Loaded
from overlock.tasks.detection import check_limits, find_objects
from overlock.tasks.sliding import check_testing, label_pixels


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
            found = find_objects(self.network, tensors, strict=True, **settings)
        except FloatingPointError:
            raise not_finite(self.precision) from None
        return [
            Objects(
                source=one.item.source, name=one.item.name, frame=one.item.frame, image=one.kept, size=one.size,
                classes=self.record.classes, places=tuple(label - 1 for label in result["labels"].tolist()),
                scores=tuple(result["scores"].tolist()), boxes=tuple(map(tuple, result["boxes"].tolist())),
                masks=result.get("masks"),
            )
            for one, result in zip(images, found, strict=True)
        ]  # fmt: skip


class Segmenter(ImagePredictor[LabelMap]):
    """A segmenter that takes images as they come; see :class:`ImagePredictor` for its arguments.

    Example:
        >>> segmenter = Segmenter.from_checkpoint("runs/small_segment")  # doctest: +SKIP
        >>> segmenter("street.jpg").shares()  # doctest: +SKIP
        {'Road': 0.41, 'Building': 0.3, 'Sky': 0.2, 'Car': 0.09}
    """

    task = "segment"
    batch_size = 1

    def __init__(self, network: nn.Module, record: Record, *, device: str | None = None, precision: Precision = "fp32"):
        super().__init__(network, record, device=device, precision=precision)
        self.transform = make_segmentation_transform(training=False, scale=record.preprocessing["scale"])

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self, images: ImageLike, *, scales: Sequence[float] = (1.0,), flip: bool = False, window: int | None = None,
        stride: int | None = None, batch_size: int = 1,
    ) -> LabelMap: ...  # fmt: skip
    @overload
    def __call__(
        self, images: Iterable[ImageLike], *, scales: Sequence[float] = (1.0,), flip: bool = False,
        window: int | None = None, stride: int | None = None, batch_size: int = 1,
    ) -> list[LabelMap]: ...  # fmt: skip
    def __call__(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: int | None = None,
        stride: int | None = None,
        batch_size: int = 1,
    ) -> LabelMap | list[LabelMap]:
        """Tell the class of each pixel.

        Args:
            images: one or several, as :class:`overlock.deploy.Predictor` takes them. The results keep them.
            scales: as :func:`overlock.tasks.sliding.segment` takes them, like the next three.
            flip: take the mean with the mirrored image.
            window: side of a sliding window.
            stride: its step.
            batch_size: images a pass, where they are of one size.

        Returns:
            The classes of one image's pixels, a list of them for several images.

        Raises:
            ValueError: for an image that cannot be read, or an argument that will not do.
        """
        result: Any = self._call(
            images, batch_size=batch_size, scales=scales, flip=flip, window=window, stride=stride
        )  # fmt: skip
        return result

    def _check(  # type: ignore[override]
        self, *, scales: Sequence[float] = (1.0,), flip: bool = False, window: int | None = None,
        stride: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        return dict(scales=scales, flip=flip, window=window, stride=check_testing(scales, window, stride))

    def _prepare(self, image: Image.Image) -> Tensor:
        return self.transform(tv_tensors.Image(pil_to_tensor(image))).as_subclass(Tensor)

    def _infer(self, images: Sequence[Loaded], settings: dict[str, Any]) -> list[LabelMap]:
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, one in enumerate(images):
            alike[one.size].append(i)
        labels: dict[int, Tensor] = {}
        for size, places in alike.items():
            prepared = torch.stack([images[i].tensor for i in places]).to(self.device)
            found = label_pixels(self.network, prepared, size=size, **settings)
            if (found < 0).any():
                raise not_finite(self.precision)
            labels.update(zip(places, found.cpu(), strict=True))
        return [
            LabelMap(
                source=one.item.source, name=one.item.name, frame=one.item.frame, image=one.kept,
                labels=labels[i].numpy(), classes=self.record.classes,
            )
            for i, one in enumerate(images)
        ]  # fmt: skip
