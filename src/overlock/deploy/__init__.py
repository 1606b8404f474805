"""Using trained networks."""

from typing import TYPE_CHECKING

from overlock import lazy

if TYPE_CHECKING:
    from overlock.deploy.dense import Detector, LabelMap, Objects, Segmenter
    from overlock.deploy.predict import Prediction, Predictor
else:
    __getattr__, __dir__ = lazy.attach(
        __name__,
        {"dense": ["Detector", "LabelMap", "Objects", "Segmenter"], "predict": ["Prediction", "Predictor"]},
    )

__all__ = ["Detector", "LabelMap", "Objects", "Prediction", "Predictor", "Segmenter"]
