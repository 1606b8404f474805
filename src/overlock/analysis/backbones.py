"""Networks as the analyses take them: the backbone within, its stages, and images prepared without a crop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from overlock.checkpoints import Record
from overlock.data import make_eval_transform
from overlock.network import OverLoCK
from overlock.tasks.features import find_backbone

NORMAL = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, interpolation="bicubic")
"""What is taken for granted of images, as heads do."""


def find_overlock(network: nn.Module, name: str) -> OverLoCK:
    """The OverLoCK in a network.

    Raises:
        ValueError: where there is none, or one that is dilated.
    """
    found = next((module for module in network.modules() if isinstance(module, OverLoCK)), None)
    if found is None or found.focus_net is None:
        raise ValueError(f"{name}: there are no dynamic kernels in this network; give one of OverLoCK's")
    if (found.focus_net.dilation, found.focus_net.step) != (1, 1):
        raise ValueError(f"{name}: the stages of this network are dilated; build it with output_stride 32")
    return found


def short_side(network: nn.Module, record: Record) -> int:
    """The side in pixels that a network's images are brought to."""
    if record.head is None:
        return int(record.preprocessing["input_size"][1])
    head: Any = network
    return int(record.preprocessing["scale"][1] if record.task == "segment" else head.transform.min_size[-1])


class Preparation:
    """Whole images to normalised tensors, so that a place in the image is the same place in the tensor.

    Evaluation crops a classifier's images; here nothing is cut off. OverLoCK, detectors and segmenters keep the aspect,
    other classifiers, of which many know one size alone, get their square.

    Args:
        network: a classifier, detector or segmenter.
        record: its own.
        side: the short side in pixels, the network's own where it is None.
        keep_aspect: as said above, unless given.

    Raises:
        ValueError: for a side of less than one pixel.
    """

    def __init__(self, network: nn.Module, record: Record, side: int | None = None, *,
                 keep_aspect: bool | None = None):  # fmt: skip
        self.side = short_side(network, record) if side is None else side
        if self.side < 1:
            raise ValueError(f"the size of images must be at least 1, got {self.side}")
        self.channels = record.channels
        usual = record.head is not None or isinstance(network, OverLoCK)
        self.keeps_aspect = usual if keep_aspect is None else keep_aspect
        self.settings = {**NORMAL, **(record.preprocessing if record.head is None else {})}

    def size_of(self, image: Image.Image) -> tuple[int, int]:
        """Height and width of the tensor of an image."""
        if not self.keeps_aspect:
            return self.side, self.side
        scale = self.side / min(image.size)
        return round(image.height * scale), round(image.width * scale)

    def __call__(self, image: Image.Image) -> Tensor:
        """An image as RGB to (1, C, H, W)."""
        whole = dict(input_size=(self.channels, *self.size_of(image)), crop_pct=1.0, crop_mode="squash")
        return make_eval_transform(self.settings | whole)(image)[None]


def stage_indices(info: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which of timm's features are the four stages: the last of each of the four largest strides.

    Networks of fewer strides, such as plain transformers, are cut into four quarters of their depth.

    Args:
        info: of a model, with the ``reduction`` of each feature.
    """
    last = {int(level["reduction"]): i for i, level in enumerate(info)}
    strides = sorted(last)[-4:]
    if len(strides) == 4:
        return [last[stride] for stride in strides]
    return [max(0, round(len(info) * quarter / 4) - 1) for quarter in (1, 2, 3, 4)]


def make_stages(network: nn.Module, name: str) -> Callable[[Tensor], list[Tensor]]:
    """What gives the features of the four stages: images (B, Cin, H, W) to four maps (B, C, H', W').

    Args:
        network: a classifier of timm's, ours among them, or a detector or segmenter, of which it is the backbone.
        name: of the network, for messages.

    Raises:
        ValueError: for a network without features.
    """
    backbone: Any = find_backbone(network)
    if backbone is not network:
        return lambda x: list(backbone(x))
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(f"{name}: timm knows no features of this model; give another")
    classifier: Any = network
    indices = stage_indices(classifier.feature_info)

    def stages(x: Tensor) -> list[Tensor]:
        maps = classifier.forward_intermediates(x, indices=sorted(set(indices)), intermediates_only=True)
        of = dict(zip(sorted(set(indices)), maps, strict=True))
        return [of[index] for index in indices]

    return stages
