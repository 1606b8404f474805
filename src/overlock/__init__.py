"""OverLoCK (CVPR 2025): a pure ConvNet that looks at the whole first and closely next.

``import overlock`` registers the variants with timm: ``timm.create_model("overlock_t", pretrained=True)``.
"""

from overlock import tasks as tasks
from overlock.blocks import ContMixBlock
from overlock.fused.fuse import fuse
from overlock.layers import ContMix, DilatedRepConv
from overlock.network import VARIANTS, OverLoCK
from overlock.tasks.pyramid import Pyramid
from overlock.version import __version__
from overlock.weights import load_weights

__all__ = [
    "VARIANTS",
    "ContMix",
    "ContMixBlock",
    "DilatedRepConv",
    "OverLoCK",
    "Pyramid",
    "__version__",
    "fuse",
    "load_weights",
]
