"""Using trained networks."""

from typing import TYPE_CHECKING

from overlock import lazy

if TYPE_CHECKING:
    from overlock.deploy.classify import Predictor
    from overlock.deploy.detect import Detector
    from overlock.deploy.embed_stage import EmbedStage
    from overlock.deploy.embedder import Embedder, Embedding
    from overlock.deploy.inputs import Failure, Item
    from overlock.deploy.results import LabelMap, Objects, Prediction
    from overlock.deploy.segment import Segmenter
else:
    __getattr__, __dir__ = lazy.attach(
        __name__,
        {
            "detect": ["Detector"],
            "embed_stage": ["EmbedStage"],
            "embedder": ["Embedder", "Embedding"],
            "inputs": ["Failure", "Item"],
            "classify": ["Predictor"],
            "results": ["LabelMap", "Objects", "Prediction"],
            "segment": ["Segmenter"],
        },
    )

__all__ = [
    "Detector",
    "EmbedStage",
    "Embedder",
    "Embedding",
    "Failure",
    "Item",
    "LabelMap",
    "Objects",
    "Prediction",
    "Predictor",
    "Segmenter",
]
