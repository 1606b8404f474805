"""Weights of the network as state dicts: names, ours and others', and the way from a file into a model."""

from overlock.weights.files import load_weights, read_checkpoint
from overlock.weights.names import RELEASE, official_name, to_official
from overlock.weights.translate import adapt_channels, translate, unwrap

__all__ = [
    "RELEASE",
    "adapt_channels",
    "load_weights",
    "official_name",
    "read_checkpoint",
    "to_official",
    "translate",
    "unwrap",
]
