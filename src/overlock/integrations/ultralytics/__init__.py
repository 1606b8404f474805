"""ContMix, Dynamic Blocks and backbones as rows of ultralytics' YOLO files.

Importing this package registers the rows, as :func:`register` does: so a checkpoint with such rows, whose loading
imports it, can be trained further and exported by ``yolo`` as any other.
"""

from importlib.util import find_spec
from pathlib import Path

from overlock.extras import missing_extra

if find_spec("ultralytics") is None:
    raise missing_extra("rows of YOLO files need ultralytics", "yolo")

from overlock.integrations.ultralytics.registration import register
from overlock.integrations.ultralytics.rows import (
    C2fContMix,
    ContMixBlock,
    DynamicBlocks,
    FeatureLevel,
    OverLoCKBackbone,
)

MODELS = Path(__file__).parent / "models"
"""Folder of YOLO files: ``MODELS / "yolo11n-contmix.yaml"``, with n, s, m, l or x for the size."""

register()

__all__ = [
    "MODELS",
    "C2fContMix",
    "ContMixBlock",
    "DynamicBlocks",
    "FeatureLevel",
    "OverLoCKBackbone",
    "register",
]
