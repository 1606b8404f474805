"""OverLoCK (CVPR 2025): a pure ConvNet that looks at the whole first and closely next.

``import overlock`` registers the variants with timm: ``timm.create_model("overlock_t", pretrained=True)``. It imports
neither timm nor PyTorch: what it adds to them is added when the program imports them, before or after.
"""

from typing import TYPE_CHECKING

from overlock import lazy
from overlock.plugins import install
from overlock.version import __version__

if TYPE_CHECKING:
    from overlock import blocks as blocks
    from overlock import fused as fused
    from overlock import layers as layers
    from overlock import network as network
    from overlock import ops as ops
    from overlock import tasks as tasks
    from overlock import weights as weights
    from overlock.blocks import ContMixBlock
    from overlock.fused.fuse import fuse
    from overlock.layers import ContMix, DilatedRepConv
    from overlock.network import VARIANTS, OverLoCK
    from overlock.tasks.pyramid import Pyramid
    from overlock.weights import load_weights
else:
    __getattr__, __dir__ = lazy.attach(
        __name__,
        {
            "blocks": ["ContMixBlock"],
            "fused.fuse": ["fuse"],
            "layers": ["ContMix", "DilatedRepConv"],
            "network": ["VARIANTS", "OverLoCK"],
            "tasks.pyramid": ["Pyramid"],
            "weights": ["load_weights"],
        },
        modules=["blocks", "fused", "layers", "network", "ops", "tasks", "weights"],
    )

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

install()
