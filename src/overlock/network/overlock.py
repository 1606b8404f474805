"""OverLoCK: Base-Net, Overview-Net and Focus-Net joined, with timm's contract of a backbone (Figure 3)."""

from collections.abc import Sequence

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from overlock.layers.arguments import check_count, check_rate
from overlock.network.base_net import BaseNet
from overlock.network.focus_net import FocusNet
from overlock.network.heads import AuxiliaryHead, ClassifierHead
from overlock.network.overview_net import OverviewNet
from overlock.network.variants import Variant

OUTPUT_STRIDES = (8, 16, 32)


@torch.fx.wrap
def check_images(x: Tensor, in_chans: int, smallest: int) -> Tensor:
    """Return the images, or say in one sentence what is wrong with them."""
    if x.dim() != 4:
        raise ValueError(f"images must be a batch (B, {in_chans}, H, W), got {x.dim()} dimensions")
    if x.size(1) != in_chans:
        raise ValueError(f"images must have {in_chans} channels, got {x.size(1)}; build the model with in_chans")
    if not x.is_floating_point():
        raise ValueError("images must be a floating-point tensor, normalised; convert with x.float() / 255 first")
    if x.size(0) < 1:
        raise ValueError("the batch of images is empty")
    if x.size(2) < smallest or x.size(3) < smallest:
        raise ValueError(f"images must be at least {smallest} x {smallest} pixels, got {x.size(2)} x {x.size(3)}")
    return x


class OverLoCK(nn.Module):
    """The network: a glance at the whole (Overview-Net), then a close look guided by it (Focus-Net).

    Args:
        variant: a row of Table 1.
        in_chans: channels of the images.
        num_classes: outputs of the classifier, 0 for pooled features.
        global_pool: 'avg', 'max', 'avgmax', or '' for none.
        stem_stride: 4; 2 or 1 for small images, which divides all strides alike.
        output_stride: largest stride of a feature: 32, or 16 or 8 for maps as DeepLab and PAN take them. The embeddings
            beyond keep the size, and the stages after them are dilated instead, with the same weights.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly over all sub-networks.
        aux_head: add the auxiliary classifier on the overview; then ``forward`` in training returns two logits. It is
            absent while there are no classes.
        deploy: build every Dilated RepConv merged, for the authors' deploy files and for inference.

    Raises:
        ValueError: for images of a wrong shape or type, and for an argument that cannot be meant: a stride or pooling
            that does not exist, a number of channels or classes that is none, a rate that is not in [0, 1).

    Why dilated: weights trained at stride 32 know neighbours 32 pixels apart; undilated kernels on a map of stride 16
    would see half of what they learned. A dilated stage takes every second (or fourth) row and column as a map of its
    own (space_to_batch.py), so that large kernels, ContMix's windows with their position biases, norms and region
    centres all see what they were trained on, and the kernels that make the network fast serve it unchanged. At every
    second position the features are exactly those of stride 32. As in any dilated network, positions in between meet
    only in the layers outside of the dilated stages; stochastic depth is drawn for each of these maps.
    """

    def __init__(  # noqa: PLR0913 - public keywords, as timm's models have them
        self,
        variant: Variant,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_stride: int = 4,
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        aux_head: bool = False,
        deploy: bool = False,
    ):
        super().__init__()
        check_count("in_chans", in_chans)
        check_rate("drop_path_rate", drop_path_rate)
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride must be one of {OUTPUT_STRIDES}, got {output_stride!r}")
        self.variant = variant
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.smallest_image = 8 * stem_stride
        self.num_features = variant.dims[3] + variant.context_dim

        rates = calculate_drop_path_rates(drop_path_rate, variant.depths, stagewise=True)
        strides = [stem_stride * 2**i for i in range(4)]
        dilation = max(1, strides[2] // output_stride), max(1, strides[3] // output_stride)  # of stages 3 and 4
        self.base_net = BaseNet(
            variant, in_chans=in_chans, stem_stride=stem_stride, dilation=dilation[0], drop_path=rates[:3],
            deploy=deploy,
        )  # fmt: skip
        self.overview_net = OverviewNet(variant, dilation=dilation, drop_path=rates[3], deploy=deploy)
        self.focus_net = FocusNet(variant, dilation=dilation, drop_path=rates[4:], deploy=deploy)
        self.head = ClassifierHead(
            self.num_features, variant.head_width, num_classes, global_pool=global_pool, drop_rate=drop_rate
        )
        self.head_hidden_size = variant.head_width
        self.wants_aux_head = aux_head
        self.aux_head = AuxiliaryHead(variant.dims[3], num_classes) if aux_head and num_classes else None

        widths = [*variant.dims[:2], variant.dims[2] + variant.context_dim, self.num_features]
        modules = ["base_net.stages.0", "base_net.stages.1", "focus_net.stage3", "focus_net.stage4"]
        self.feature_info = [
            dict(num_chs=width, reduction=min(stride, output_stride), module=module)
            for width, stride, module in zip(widths, strides, modules, strict=True)
        ]
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images (B, Cin, H, W) to logits (B, num_classes); with ``aux_head``, in training, the auxiliary ones too."""
        x = check_images(x, self.in_chans, self.smallest_image)
        x = self.base_net(x)[-1]
        if self.overview_net is None or self.focus_net is None:
            return self.head(x)
        overview, prior = self.overview_net(x)
        logits = self.head(self.focus_net(x, prior)[-1])
        if self.training and self.aux_head is not None:
            return logits, self.aux_head(overview)
        return logits

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last features, (B, C4 + Cc, H/32, W/32) or by the output stride, unpooled."""
        return self.forward_intermediates(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last features to logits, or to the head's pooled hidden layer."""
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
        """The four features of section 3.1, at strides 4, 8, 16 and 32 with the default stem.

        Args:
            x: images (B, Cin, H, W).
            indices: which features: the last n, a list, or all.
            norm: without effect, the network ends in no norm.
            stop_early: stop after the last feature asked for.
            output_fmt: 'NCHW'.
            intermediates_only: leave the last features out.

        Returns:
            Last features and a list of intermediates, or the list alone.

        Raises:
            ValueError: for features or a format that do not exist, and for images of a wrong shape or type.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = _take(len(self.feature_info), indices)
        x = check_images(x, self.in_chans, self.smallest_image)
        base = self.base_net(x, last + 1 if stop_early else 3)
        features = base[:2]
        if self.overview_net is not None and self.focus_net is not None and not (stop_early and last < 2):
            _, prior = self.overview_net(base[-1])
            features += self.focus_net(base[-1], prior, last=not (stop_early and last < 3))
        intermediates = [features[i] for i in take]
        return intermediates if intermediates_only else (features[-1], intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features asked for do not need; returns their indices from the front.

        Raises:
            ValueError: for features that do not exist.
        """
        take, last = _take(len(self.feature_info), indices)
        if last < 2:
            self.overview_net = self.focus_net = None  # type: ignore[assignment]
            self.base_net.stages = self.base_net.stages[: last + 1]
        elif last == 2 and self.focus_net is not None:
            self.focus_net.prune_last()
        pruned = last < len(self.feature_info) - 1
        self.feature_info = self.feature_info[: last + 1]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.head.prune(self.num_features)
            self.head_hidden_size, self.num_classes = self.num_features, 0
            self.wants_aux_head, self.aux_head = False, None
        return take

    @torch.jit.ignore
    def get_classifier(self, name: str | None = None) -> nn.Module | None:
        """The classifier; ``name='aux'`` the auxiliary one.

        Raises:
            ValueError: for another name.
        """
        if name == "aux":
            return None if self.aux_head is None else self.aux_head.fc
        if name is not None:
            raise ValueError(f"there is a classifier without a name, and one named 'aux'; got {name!r}")
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers, and the pooling where one is named.

        Without classes (0) there is no auxiliary head; with some again it is back, where the network was built with it.
        """
        like = next(self.parameters())
        self.head.reset(num_classes, global_pool)
        self.num_classes = num_classes
        has_aux = self.wants_aux_head and num_classes > 0
        self.aux_head = AuxiliaryHead(self.variant.dims[3], num_classes) if has_aux else None
        self.to(device=like.device, dtype=like.dtype).train(self.training)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass, or stop doing so."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str | list[tuple[str, tuple[int, ...] | None]]]:
        """Parameter groups from shallow to deep, for layer-wise learning rates."""
        if coarse:
            return dict(
                stem=r"^base_net\.stages\.0\.embed", base_net=r"^base_net\.stages\.(\d+)",
                overview_net=r"^overview_net", focus_net=r"^focus_net\.stage(\d+)",
            )  # fmt: skip
        return dict(
            stem=r"^base_net\.stages\.0\.embed",
            base_net=[(r"^base_net\.stages\.(\d+)\.embed", (-1,)), (r"^base_net\.stages\.(\d+)\.blocks\.(\d+)", None)],
            overview_net=[
                (r"^overview_net\.stage\.embed", (-1,)),
                (r"^overview_net\.stage\.blocks\.(\d+)", None),
                (r"^overview_net\.reduce", (99999,)),
            ],
            focus_stage3=r"^focus_net\.stage3\.blocks\.(\d+)",
            focus_embed=r"^focus_net\.embed",
            focus_stage4=r"^focus_net\.stage4\.blocks\.(\d+)",
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing beyond what the optimiser factory leaves out by itself: biases, norms and other 1-D parameters."""
        return set()


def _take(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Indices from the front, and the last of them."""
    asked = range(-indices, 0) if isinstance(indices, int) else indices
    if asked is not None and (len(asked) == 0 or not all(-count <= index < count for index in asked)):
        raise ValueError(
            f"the features are 0 to {count - 1} (or -{count} to -1), a number is that of the last ones; got {indices!r}"
        )
    return feature_take_indices(count, indices)


def _init_weights(module: nn.Module) -> None:
    """Truncated normal of deviation 0.02, zero biases, as the authors initialise."""
    if isinstance(module, (nn.Conv2d, nn.Linear)) and not module.weight.is_meta:
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
