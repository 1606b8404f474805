"""Training on Lightning Fabric: configuration, recipes, the loop, the run."""

from overlock.training.config import RunConfig, TrainConfig
from overlock.training.detection_config import DetectConfig
from overlock.training.recipes import CONFIGS, RECIPES
from overlock.training.segmentation_config import SegmentConfig

__all__ = ["CONFIGS", "RECIPES", "DetectConfig", "RunConfig", "SegmentConfig", "TrainConfig"]
