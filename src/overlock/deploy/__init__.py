"""Using trained networks."""

from overlock.deploy.predict import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
