"""Using trained networks."""

from typing import TYPE_CHECKING

from overlock import lazy

if TYPE_CHECKING:
    from overlock.deploy.dense import Detector, Segmenter
    from overlock.deploy.inputs import Failure, Item
    from overlock.deploy.predict import Predictor
    from overlock.deploy.results import LabelMap, Objects, Prediction
else:
    __getattr__, __dir__ = lazy.attach(
        __name__,
        {
            "dense": ["Detector", "Segmenter"],
            "inputs": ["Failure", "Item"],
            "predict": ["Predictor"],
            "results": ["LabelMap", "Objects", "Prediction"],
        },
    )

__all__ = ["Detector", "Failure", "Item", "LabelMap", "Objects", "Prediction", "Predictor", "Segmenter"]
