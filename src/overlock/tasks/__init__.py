"""What the network is used for."""

from overlock.tasks import classification as classification
from overlock.tasks.pyramid import Pyramid

__all__ = ["Pyramid"]
