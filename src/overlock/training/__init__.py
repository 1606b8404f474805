"""Training on Lightning Fabric: configuration, recipes, the loop, the run."""

from overlock.training.config import RunConfig, TrainConfig
from overlock.training.dense_config import DetectConfig, SegmentConfig
from overlock.training.recipes import CONFIGS, RECIPES

__all__ = ["CONFIGS", "RECIPES", "DetectConfig", "RunConfig", "SegmentConfig", "TrainConfig"]
