"""The three sub-networks and the network they make."""

from overlock.network.overlock import OverLoCK
from overlock.network.variants import VARIANTS, Variant

__all__ = ["VARIANTS", "OverLoCK", "Variant"]
