"""Using trained networks."""

from overlock.deploy.dense import Detector, LabelMap, Objects, Segmenter
from overlock.deploy.predict import Prediction, Predictor

__all__ = ["Detector", "LabelMap", "Objects", "Prediction", "Predictor", "Segmenter"]
