"""Layers of the blocks, one idea a file."""

from overlock.layers.contmix import ContMix
from overlock.layers.conv_ffn import AffineScale, ConvFFN, GlobalResponseNorm, LocalConv
from overlock.layers.conv_norm import BatchNorm2d, ConvNorm, NormConv
from overlock.layers.dilated_repconv import DilatedRepConv
from overlock.layers.gdsa import GDSA, Aggregator

__all__ = [
    "GDSA",
    "AffineScale",
    "Aggregator",
    "BatchNorm2d",
    "ContMix",
    "ConvFFN",
    "ConvNorm",
    "DilatedRepConv",
    "GlobalResponseNorm",
    "LocalConv",
    "NormConv",
]
