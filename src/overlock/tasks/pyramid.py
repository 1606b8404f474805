"""The dense backbone: four normalised features for detection and segmentation (section 4.2 and 4.3)."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from overlock.layers import AffineScale
from overlock.network import OverLoCK
from overlock.network.overlock import check_images

torch.fx.wrap("check_images")


class Pyramid(nn.Module):
    """A layer norm on each of the network's four features, as the authors' dense backbones have it.

    The stride-8 feature goes on to stage 3 *after* its norm: so the released dense weights were trained, and so they
    give the released outputs. The other three norms are on the outputs alone.

    Args:
        backbone: the network; its classifier is dropped.
        overview: add the overview, projected and weakly scaled, to the last feature, as the detection backbone does.

    Attributes:
        feature_info: channels and strides of the features, in timm's form.
    """

    def __init__(self, backbone: OverLoCK, *, overview: bool = False):
        super().__init__()
        self.backbone = backbone
        backbone.prune_intermediate_layers([0, 1, 2, 3])
        self.feature_info = backbone.feature_info
        self.norms = nn.ModuleList([LayerNorm2d(int(info["num_chs"]), eps=1e-6) for info in self.feature_info])
        self.overview_norm = self.overview_proj = self.overview_scale = None
        if overview:
            width, last = backbone.variant.dims[3], backbone.num_features
            self.overview_norm = LayerNorm2d(width, eps=1e-6)
            self.overview_proj = nn.Conv2d(width, last, kernel_size=1)
            self.overview_scale = AffineScale(last, init=1e-5)
        like = next(backbone.parameters())
        self.to(device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, Cin, H, W) to features at strides 4, 8, 16 and 32, with the default stem and output stride.

        Raises:
            ValueError: for images of a wrong shape or type.
        """
        net = self.backbone
        x = check_images(x, net.in_chans, net.smallest_image)
        stage1, stage2, stage3 = net.base_net.stages
        norm1, norm2, norm3, norm4 = self.norms
        low = stage1(x)
        mid = norm2(stage2(low))
        base = stage3(mid)
        overview, prior = net.overview_net(base)  # type: ignore[misc]
        focus3, focus4 = net.focus_net(base, prior)  # type: ignore[misc]
        last = norm4(focus4)
        if self.overview_norm is not None:
            last = last + self.overview_scale(self.overview_proj(self.overview_norm(overview)))  # type: ignore[misc]
        return [norm1(low), mid, norm3(focus3), last]
