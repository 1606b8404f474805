"""Class activation maps by the grad-cam library, at the layers that stand for the stages (Figure 2b)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from overlock.analysis.backbones import stage_indices
from overlock.extras import needing
from overlock.network import OverLoCK
from overlock.tasks.features import find_backbone

METHODS = dict(
    gradcam="GradCAM", gradcam_plus="GradCAMPlusPlus", hirescam="HiResCAM", layercam="LayerCAM", xgradcam="XGradCAM",
    eigencam="EigenCAM", eigengradcam="EigenGradCAM",
)  # fmt: skip
"""Names of methods, and the library's own."""


class Layer(NamedTuple):
    """A module whose output is a map of features."""

    name: str
    """'overview', or 'stage1' to 'stage4'."""
    module: nn.Module
    reshape: Callable[[Tensor], Tensor]
    """From its output, or the gradient of that, to (B, C, H, W) in float32."""


def find_layers(network: nn.Module, name: str) -> dict[str, Layer]:
    """The layers to look at, by name.

    Of OverLoCK they are the last block's output of stages 1 and 2, of Overview-Net, and of both stages of Focus-Net,
    there with the context beside the features. Overview-Net acts on the output by the context prior alone, so its map
    shows where the prior comes from. Of other models of timm they are what timm names as features.

    Args:
        network: a classifier, detector or segmenter.
        name: of it, for messages.

    Raises:
        ValueError: for a network without features.
    """
    overlock = next((module for module in network.modules() if isinstance(module, OverLoCK)), None)
    if overlock is not None:
        return _layers_of_overlock(overlock)
    backbone: Any = find_backbone(network)
    if not hasattr(backbone, "feature_info"):
        raise ValueError(f"{name}: timm knows no features of this model; give another")
    info = backbone.feature_info
    levels = info.get_dicts(["module", "num_chs", "reduction"]) if hasattr(info, "get_dicts") else list(info)
    prefix = getattr(backbone, "num_prefix_tokens", 0)
    layers = {}
    for stage, index in enumerate(stage_indices(levels), start=1):
        module = _find_module(backbone, levels[index]["module"], name)
        layers[f"stage{stage}"] = Layer(f"stage{stage}", module, _ToMap(levels[index]["num_chs"], prefix))
    return layers


def _layers_of_overlock(network: OverLoCK) -> dict[str, Layer]:
    stages: Any = network.base_net.stages
    modules: dict[str, Any] = dict(stage1=stages[0], stage2=stages[1])
    if network.overview_net is not None:
        modules["overview"] = network.overview_net.stage
    for stage in ("stage3", "stage4"):
        blocks: Any = getattr(network.focus_net, stage, None)
        if blocks is not None:  # the stage's own output is a pair, that of its last residual is one map
            modules[stage] = blocks.blocks[-1].residual2
    return {name: Layer(name, module, _float32) for name, module in modules.items()}


def _float32(x: Tensor) -> Tensor:
    return x.float()


def _find_module(backbone: nn.Module, path: str, name: str) -> nn.Module:
    """A module by timm's path, also where ``features_only`` has moved it."""
    for known in (path, path.replace(".", "_"), f"model.{path}"):
        try:
            return backbone.get_submodule(known)
        except AttributeError:
            continue
    raise ValueError(f"{name}: its layer {path} cannot be found; give another model")


class _ToMap:
    """Features as networks have them, channels first, channels last or as tokens, to (B, C, H, W)."""

    def __init__(self, channels: int, prefix: int):
        self.channels, self.prefix = channels, prefix

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            x = x[:, self.prefix :]
            side = math.isqrt(x.shape[1])
            x = x.unflatten(1, (side, x.shape[1] // side))
        if x.shape[1] != self.channels and x.shape[-1] == self.channels:
            x = x.permute(0, 3, 1, 2)
        return x.float()


def activation_map(
    network: nn.Module, images: Tensor, layer: Layer, targets: list[Any], *, method: str = "gradcam"
) -> np.ndarray[Any, Any]:
    """Class activation maps, scaled to 0 to 1 each.

    Args:
        network: in evaluation mode.
        images: (B, C, H, W), as the network takes them.
        layer: of :func:`find_layers`.
        targets: for each image, what makes a score of its output; see :func:`target_of`.
        method: one of METHODS.

    Returns:
        (B, H, W); all zeros where the score does not depend on the layer, or only negatively.

    Raises:
        ValueError: for another method, and where a map is no finite number.
        ImportError: without the library.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    with getattr(_library(), METHODS[method])(network, [layer.module], reshape_transform=layer.reshape) as cam:
        maps = cam(input_tensor=images, targets=targets)
    network.zero_grad(set_to_none=True)
    if not np.isfinite(maps).all():
        raise ValueError("the activation map is no finite number; try --precision bf16 or fp32")
    return maps


def _library() -> Any:
    with needing("class activation maps need grad-cam", "cam"):
        import pytorch_grad_cam  # noqa: PLC0415
    return pytorch_grad_cam


@torch.no_grad()
def target_of(network: nn.Module, images: Tensor, task: str, label: int | None = None) -> tuple[Any, int]:
    """What a map explains: a class, by default the one that the network is surest of.

    Of a classifier it is the class's logit; of a segmenter the sum of its logits over the pixels that are given it; of
    a detector the scores of its objects of the class, and how well boxes agree with theirs.

    Args:
        network: in evaluation mode.
        images: (1, C, H, W), as the network takes them.
        task: 'classify', 'detect' or 'segment'.
        label: place of the class in the names.

    Returns:
        A target of the library's, and the class.

    Raises:
        ValueError: where a detector finds no object, or a segmenter no pixel of the class.
        ImportError: without the library.
    """
    targets = _library().utils.model_targets
    output = network(images)
    if task == "classify":
        label = int(output[0].argmax()) if label is None else label
        return targets.ClassifierOutputTarget(label), label
    if task == "segment":
        places = output[0].argmax(dim=0)
        label = int(places.flatten().mode().values) if label is None else label
        if not (places == label).any():
            raise ValueError("no pixel is given this class; give another with --target")
        return targets.SemanticSegmentationTarget(label, (places == label).float().cpu().numpy()), label
    found = output[0]
    if label is None and len(found["labels"]):
        label = int(found["labels"][found["scores"].argmax()]) - 1
    chosen = found["labels"] == (0 if label is None else label + 1)
    if label is None or not chosen.any():
        raise ValueError("no object of this class is found in the image; give another one, or another --target")
    boxes = found["boxes"][chosen].float().cpu().numpy()
    return targets.FasterRCNNBoxScoreTarget([label + 1] * len(boxes), boxes), label
