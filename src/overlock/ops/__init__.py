"""Operations that PyTorch has not, or not fast: dynamic and depthwise convolution, response norm."""

from overlock.ops.backends import BACKENDS, backend
from overlock.ops.depthwise import depthwise_conv2d
from overlock.ops.functional import contmix, region_centres
from overlock.ops.local_conv import local_conv
from overlock.ops.response_norm import response_norm

__all__ = ["BACKENDS", "backend", "contmix", "depthwise_conv2d", "local_conv", "region_centres", "response_norm"]
