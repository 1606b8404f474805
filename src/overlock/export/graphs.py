"""From a network to a graph: what is exported of it, traced once for all formats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from overlock.checkpoints import Record
from overlock.export.contmix import Places, PlainContMix
from overlock.export.detectors import detect
from overlock.export.plain import plain_form
from overlock.export.spec import Spec, Task
from overlock.export.write import quietly, uncached


class Entry(nn.Module):
    """Images (B, C, H, W) to the outputs of a task: logits, features, the logits of all pixels, or objects.

    Args:
        network: in the form that is exported.
        record: of the network.
        task: of the file.
        with_preprocessing: take pixels of 0 to 255, of any type, and normalise them.
    """

    def __init__(self, network: nn.Module, record: Record, task: Task, *, with_preprocessing: bool = False):
        super().__init__()
        self.network = network if task != "features" or record.head is None else _features_of(network)
        self.intermediates = task == "features" and record.head is None
        self.detects = task == "detect"
        self.with_preprocessing = with_preprocessing
        mean, std = normalisation(record)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        network: Any = self.network
        if self.with_preprocessing:
            images = (images.to(torch.float32) / 255 - self.mean) / self.std  # type: ignore[operator]
        if self.detects:
            return detect(network, images)
        outputs = (
            network.forward_intermediates(images, intermediates_only=True) if self.intermediates else network(images)
        )
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _features_of(network: Any) -> nn.Module:
    """The backbone of a detector, below its feature pyramid, or of a segmenter."""
    return getattr(network.backbone, "body", network.backbone)


def normalisation(record: Record) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, of pixels of 0 to 1."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: PLC0415

    given = record.preprocessing
    return given.get("mean", IMAGENET_DEFAULT_MEAN), given.get("std", IMAGENET_DEFAULT_STD)


def make_entry(network: nn.Module, spec: Spec) -> Entry:
    """The module that is traced."""
    places = Places()
    plain = plain_form(network, places, norms_by_maps=spec.format == "openvino")
    entry = Entry(plain, spec.record, spec.task, with_preprocessing=spec.with_preprocessing).eval()
    entry.register_forward_pre_hook(lambda *_: places.forget())
    return entry


class AveragesOfAnySize(TorchFunctionMode):
    """Has adaptive average pooling by operations that follow the size of the map.

    PyTorch's exporter to ONNX writes it as a gather of the regions of the size that it is traced at.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.adaptive_avg_pool2d:
            return self._average(*args, **kwargs or {})
        return func(*args, **kwargs or {})

    def _average(self, input: Tensor, output_size: Any) -> Tensor:  # noqa: A002 - as PyTorch names it
        sides = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
        height, width = (own if side is None else side for side, own in zip(sides, input.shape[-2:], strict=True))
        return Places().average(input, height, width)  # what one pass of a trace made is not for the next


def trace(entry: Entry, spec: Spec) -> torch.export.ExportedProgram:
    """The graph of a network, free in what the spec says.

    Raises:
        ValueError: where the network cannot be traced.
    """
    height, width = spec.image_size
    if "size" in spec.dynamic:  # sides that differ, or the graph would hold for squares alone
        height += 32
    batch = 2 if "batch" in spec.dynamic else 1  # a batch of 1 would be taken for a constant
    images = example_images(spec, batch, (height, width))
    axes: dict[int, Any] = {0: "batch"} if "batch" in spec.dynamic else {}
    axes |= {2: "size", 3: "size"} if "size" in spec.dynamic else {}
    free = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)  # type: ignore[attr-defined]
    try:
        with torch.no_grad(), quietly(), uncached(spec), AveragesOfAnySize():
            return torch.export.export(entry, (images,), dynamic_shapes=(free,) if free else None, strict=False)
    except (RuntimeError, torch._dynamo.exc.UserError) as error:
        raise ValueError(f"{spec.record.name} cannot be exported so: {str(error).strip().splitlines()[0]}") from None


def example_images(spec: Spec, batch: int, size: tuple[int, int]) -> Tensor:
    """Images of zeros as a file takes them."""
    dtype = torch.uint8 if spec.with_preprocessing else torch.float32
    return torch.zeros(batch, spec.record.channels, *size, dtype=dtype)


def smallest_image(network: nn.Module) -> int:
    """Least side in pixels of images whose maps have room for all dynamic kernels, which a free size needs."""
    plain = [module for module in network.modules() if hasattr(module, "focus_net")]
    sides = [1]
    for net in plain:
        info: Any = net.feature_info
        stages: Any = (net.focus_net.stage3, net.focus_net.stage4)  # type: ignore[union-attr]
        for stage, level in zip(stages, info[2:], strict=True):
            kernel = max((m.kernel_size for m in stage.modules() if isinstance(m, PlainContMix)), default=1)
            sides.append((kernel - 1) * int(level["reduction"]) + 1)
    return max(sides)
