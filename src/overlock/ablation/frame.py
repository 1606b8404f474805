"""What the networks of both tables have in common: timm's contract of a backbone, and initial values by name."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from overlock.network.overlock import check_images


class Frame(nn.Module):
    """A backbone of four features and a head. Its subclasses say what the features are.

    Args:
        head: called with the last feature; has ``fc`` and ``reset``, as those of timm.
        head_width: inputs of the classifier.
        widths: channels of the four features.
        modules: names of the modules that give them.
        in_chans: channels of the images.
        num_classes: outputs of the classifier, 0 for pooled features.
        stem_stride: stride of the first feature.
    """

    def __init__(
        self, *, head: nn.Module, head_width: int, widths: tuple[int, ...], modules: tuple[str, ...], in_chans: int,
        num_classes: int, stem_stride: int,
    ):  # fmt: skip
        super().__init__()
        self.head: Any = head
        self.in_chans, self.num_classes = in_chans, num_classes
        self.smallest_image = 8 * stem_stride
        self.num_features, self.head_hidden_size = widths[-1], head_width
        self.feature_info = [
            dict(num_chs=width, reduction=stem_stride * 2**i, module=module)
            for i, (width, module) in enumerate(zip(widths, modules, strict=True))
        ]

    def features(self, x: Tensor, last: int = 3) -> list[Tensor]:
        """Images (B, Cin, H, W) to the features up to one, at strides 4, 8, 16 and 32 with the default stem."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, Cin, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last feature (B, C4, H/32, W/32), unpooled."""
        return self.features(check_images(x, self.in_chans, self.smallest_image))[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature to logits, or to what the classifier is given."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The chosen features, with the last one or alone; arguments as those of timm's models.

        Raises:
            ValueError: for a format that does not exist, and for images of a wrong shape or type.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.feature_info), indices)
        x = check_images(x, self.in_chans, self.smallest_image)
        features = self.features(x, last if stop_early else len(self.feature_info) - 1)
        intermediates = [features[i] for i in take]
        return intermediates if intermediates_only else (features[-1], intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the classifier; the features asked for, by their indices from the front."""
        take, _ = feature_take_indices(len(self.feature_info), indices)
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling where one is named."""
        like = next(self.parameters())
        self.head.reset(num_classes, global_pool)
        self.num_classes = num_classes
        self.to(device=like.device, dtype=like.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass, or stop doing so."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable  # type: ignore[assignment]

    def no_weight_decay(self) -> set[str]:
        """Nothing beyond biases, norms and other 1-D parameters."""
        return set()


def build_alike(build: Callable[..., nn.Module], **arguments: Any) -> nn.Module:
    """A network whose initial values follow from PyTorch's seed and the names of layers, not from their order.

    So networks that differ in a part begin alike in all others. The distribution is OverLoCK's: weights of convolutions
    and linear layers are truncated normal of deviation 0.02, their biases zero.
    """
    seed = int(torch.randint(2**31, (), device="cpu"))  # before the network draws
    network = build(**arguments)
    _draw_by_name(network, seed)
    return network


@torch.no_grad()
def _draw_by_name(network: nn.Module, seed: int) -> None:
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not module.weight.is_meta:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            values = torch.empty(module.weight.shape, device="cpu")
            module.weight.copy_(nn.init.trunc_normal_(values, std=0.02, generator=generator))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
