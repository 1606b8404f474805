"""Training on Lightning Fabric: configuration, recipes, the loop, the run."""

from overlock.training.config import CONFIGS, DetectConfig, RunConfig, SegmentConfig, TrainConfig
from overlock.training.recipes import RECIPES

__all__ = ["CONFIGS", "RECIPES", "DetectConfig", "RunConfig", "SegmentConfig", "TrainConfig"]
