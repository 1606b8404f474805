"""Operations that PyTorch has not, or not fast: dynamic and depthwise convolution, response norm."""

from overlock.ops.contmix import contmix, contmix_kernels, region_centres
from overlock.ops.depthwise import depthwise_conv2d
from overlock.ops.dispatch import BACKENDS, backend
from overlock.ops.grn import response_norm
from overlock.ops.residual_depthwise import local_conv
from overlock.ops.workspace import release_workspace

__all__ = [
    "BACKENDS",
    "backend",
    "contmix",
    "contmix_kernels",
    "depthwise_conv2d",
    "local_conv",
    "region_centres",
    "release_workspace",
    "response_norm",
]
