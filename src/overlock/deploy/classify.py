"""Classification: path, PIL image, array or tensor in, a typed result out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor, nn

from overlock.checkpoints import Record
from overlock.data import make_eval_transform
from overlock.deploy.inputs import ImageLike
from overlock.deploy.results import Prediction
from overlock.deploy.runtime import Precision, not_finite
from overlock.deploy.stream import ImagePredictor, Loaded

DEFAULT_FILE = Path(__file__).parent / "assets" / "overlock_atto_cifar10.safetensors"
"""The weights that come with the package, trained on CIFAR-10."""
KEPT = (272, 216)
"""Width and height that the copy of an image in a result has at most."""


class Predictor(ImagePredictor[Prediction]):
    """A classifier that takes images as they come; see :class:`ImagePredictor` for its arguments.

    Example:
        >>> predictor = Predictor.default()  # doctest: +SKIP
        >>> predictor("examples/photos/cat.jpg").labels[0]  # doctest: +SKIP
        'cat'
    """

    task = "classify"
    batch_size = 32

    def __init__(self, network: nn.Module, record: Record, *, device: str | None = None, precision: Precision = "fp32"):
        if record.task != self.task:
            raise ValueError(f"this is a {record.name}, not a classifier; predict with --task {record.task}")
        super().__init__(network, record, device=device, precision=precision)
        self.transform = make_eval_transform(record.preprocessing)

    @classmethod
    def default(cls, *, device: str | None = None, precision: Precision = "fp32") -> Predictor:
        """The network that comes with the package: ``overlock_atto`` for the ten classes of CIFAR-10.

        Whatever an image shows is given one of those ten names.
        """
        return cls.from_checkpoint(DEFAULT_FILE, device=device, precision=precision)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self, images: ImageLike, *, top: int = 5, batch_size: int = 32, keep_images: bool = True
    ) -> Prediction: ...
    @overload
    def __call__(
        self, images: Iterable[ImageLike], *, top: int = 5, batch_size: int = 32, keep_images: bool = True
    ) -> list[Prediction]: ...
    def __call__(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        top: int = 5,
        batch_size: int = 32,
        keep_images: bool = True,
    ) -> Prediction | list[Prediction]:
        """Classify.

        Args:
            images: one or several of: path; PIL image; array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or tensor
                (1, H, W), (3, H, W) or (4, H, W); both uint8 of 0 to 255, or floats of 0 to 1.
            top: how many classes; all where there are fewer.
            batch_size: images a pass.
            keep_images: keep a small copy of each image, of up to 176 kB, to draw it with.

        Returns:
            A prediction for one image, a list of them for several.

        Raises:
            ValueError: for an image that cannot be read, or values or a shape that an image does not have.
        """
        result: Any = self._call(images, batch_size=batch_size, keep_images=keep_images, top=top)
        return result

    def _check(self, *, top: int = 5) -> dict[str, Any]:  # type: ignore[override]
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        return dict(top=top)

    def _prepare(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    def _keep(self, image: Image.Image) -> Image.Image:
        small = image.copy() if max(image.size) <= min(KEPT) else image.reduce(_factor(image))
        small.thumbnail(KEPT, Image.Resampling.LANCZOS)
        return small

    def _infer(self, images: Sequence[Loaded], settings: dict[str, Any]) -> list[Prediction]:
        logits = self.network(torch.stack([one.tensor for one in images]).to(self.device))
        probabilities = logits.float().softmax(dim=1).cpu()
        if not probabilities.isfinite().all():
            raise not_finite(self.precision)
        values, places = probabilities.topk(min(settings["top"], probabilities.shape[1]), dim=1)
        return [
            Prediction(
                source=one.item.source, name=one.item.name, frame=one.item.frame, image=one.kept,
                labels=tuple(self.record.classes[place] for place in row.tolist()),
                probabilities=tuple(value.tolist()),
            )
            for one, value, row in zip(images, values, places, strict=True)
        ]  # fmt: skip


def _factor(image: Image.Image) -> int:
    """By which an image can first be reduced, fast, and still be sharp after the last step."""
    return max(1, int(max(image.width / KEPT[0], image.height / KEPT[1])) // 3)
