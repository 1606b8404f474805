"""Operations that PyTorch does not have: ContMix's dynamic convolution, with several backends."""

from overlock.ops.backends import BACKENDS, backend
from overlock.ops.functional import contmix, region_centres

__all__ = ["BACKENDS", "backend", "contmix", "region_centres"]
