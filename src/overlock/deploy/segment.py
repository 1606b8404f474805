"""Semantic segmentation: path, PIL image, array or tensor in, a typed result out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.functional import pil_to_tensor

from overlock.checkpoints import Record
from overlock.data.segmentation_transforms import make_segmentation_transform
from overlock.deploy.inputs import ImageLike
from overlock.deploy.results import LabelMap
from overlock.deploy.runtime import Precision, not_finite
from overlock.deploy.stream import ImagePredictor, Loaded
from overlock.tasks.sliding import check_testing, label_pixels


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
