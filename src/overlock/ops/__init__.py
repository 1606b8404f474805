"""Operations that PyTorch does not have, or not fast: ContMix's dynamic convolution and the large depthwise one."""

from overlock.ops.backends import BACKENDS, backend
from overlock.ops.depthwise import depthwise_conv2d
from overlock.ops.functional import contmix, region_centres
from overlock.ops.response_norm import response_norm

__all__ = ["BACKENDS", "backend", "contmix", "depthwise_conv2d", "region_centres", "response_norm"]
