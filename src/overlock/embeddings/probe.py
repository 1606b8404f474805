"""How well a network's vectors tell classes apart: nearest neighbours and a linear probe, by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from overlock.data.parts import TEST_PARTS, TRAIN_PARTS
from overlock.embeddings.duplicates import THRESHOLD, check_threshold, group_labels
from overlock.embeddings.index import Index
from overlock.embeddings.shards import Embeddings

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of the linear probe's regularisation that are tried."""
FOLDS = 3  # of the training part, to choose among them
SHARE = 0.95  # of the intervals


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Of a classifier on the test part, with Wilson's interval of 95 %."""

    name: str
    right: int
    images: int
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        """Share of the images."""
        return self.right / self.images


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows of embeddings to train on and to test on, of which none are near-duplicates across."""

    train: np.ndarray[Any, Any]
    test: np.ndarray[Any, Any]
    told: str
    """How they came about."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What classifiers of the embeddings do."""

    classes: int
    train: int
    test: int
    split: str
    accuracies: tuple[Accuracy, ...]
    strength: float
    """The inverse strength of regularisation that the linear probe took."""


def make_split(index: Index, labels: Sequence[str], *, test_size: float, threshold: float, seed: int) -> Split:
    """The data's own parts where ids begin with their names, such as train/ and val/; else one by groups of
    near-duplicates, with the classes in the same shares.

    Raises:
        ValueError: where a part is empty, or the images are too few to be split.
    """
    embeddings = index.embeddings
    groups = group_labels(index.pairs(threshold), len(embeddings))
    parts = np.array([name.partition("/")[0].lower() for name in embeddings.ids])
    train, test = np.isin(parts, TRAIN_PARTS), np.isin(parts, TEST_PARTS)
    if train.any() and test.any():
        leaking = train & np.isin(groups, groups[test])
        told = f"by the parts of the data; {leaking.sum()} near-duplicates of tested images are not trained on"
        return Split(train=np.flatnonzero(train & ~leaking), test=np.flatnonzero(test), told=told)
    from sklearn.model_selection import StratifiedGroupKFold  # noqa: PLC0415

    folds = StratifiedGroupKFold(max(2, round(1 / test_size)), shuffle=True, random_state=seed)
    try:
        chosen, held_out = next(folds.split(embeddings.vectors, labels, groups))
    except ValueError as error:
        raise ValueError(f"{embeddings.folder}: the images are too few to be split ({error})") from None
    joined = len(groups) - len(np.unique(groups))
    told = f"at random, seed {seed}, near-duplicates on the same side ({joined} images beside another)"
    return Split(train=chosen, test=held_out, told=told)


def probe(
    embeddings: Embeddings, *, neighbours: int = 20, test_size: float = 0.2, threshold: float = THRESHOLD, seed: int = 0
) -> Probe:
    """Train and test a classifier of nearest neighbours and a linear one on the vectors.

    Args:
        embeddings: with labels.
        neighbours: that vote, each by its cosine; all images of the training part where these are fewer.
        test_size: share of the images to test on, where the data have no parts of their own.
        threshold: cosine above which two images are near-duplicates.
        seed: of the split.

    Raises:
        ValueError: for embeddings without labels or of one class, and settings that will not do.
    """
    check_threshold(threshold)
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    if not 0 < test_size <= 0.5:
        raise ValueError(f"test_size must be above 0 and up to 0.5, got {test_size}")
    labels = embeddings.labels
    nameless = sum(label is None for label in labels)
    if nameless or len(set(labels)) < 2:
        what = f"{nameless} images have no label" if nameless else f"all images have the label {labels[0]!r}"
        raise ValueError(
            f"{embeddings.folder}: {what}; a probe needs two classes or more: embed images in folders named by class"
        )
    known = [str(label) for label in labels]
    split = make_split(Index(embeddings), known, test_size=test_size, threshold=threshold, seed=seed)
    classes, targets = np.unique(known, return_inverse=True)
    absent = sorted(set(range(len(classes))) - set(targets[split.train].tolist()))
    if absent:
        raise ValueError(f"{embeddings.folder}: no image of class {classes[absent[0]]!r} is left to train on")
    strength, linear = _linear_predictions(embeddings.vectors, targets, split, seed)
    neighbours = min(neighbours, len(split.train))
    predictions = {
        f"{neighbours} nearest neighbours": _neighbour_predictions(embeddings.vectors, targets, split, neighbours),
        "linear probe": linear,
    }
    truth = targets[split.test]
    return Probe(
        classes=len(classes), train=len(split.train), test=len(split.test), split=split.told, strength=strength,
        accuracies=tuple(score(name, int((told == truth).sum()), len(truth)) for name, told in predictions.items()),
    )  # fmt: skip


def score(name: str, right: int, images: int) -> Accuracy:
    """An accuracy with its interval."""
    from scipy.stats import binomtest  # noqa: PLC0415

    interval = binomtest(right, images).proportion_ci(SHARE, method="wilson")
    return Accuracy(name=name, right=right, images=images, low=float(interval.low), high=float(interval.high))


def _neighbour_predictions(vectors: Any, targets: Any, split: Split, neighbours: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier  # noqa: PLC0415

    classifier = KNeighborsClassifier(neighbours, metric="cosine", algorithm="brute", weights=_by_cosine)
    return classifier.fit(vectors[split.train], targets[split.train]).predict(vectors[split.test])


def _by_cosine(distances: Any) -> Any:
    """Votes of neighbours at cosine distances."""
    return np.maximum(1 - distances, 0)


def _linear_predictions(vectors: Any, targets: Any, split: Split, seed: int) -> tuple[float, Any]:
    """The strength chosen on the training part alone, and the test part's predictions."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.model_selection import GridSearchCV, StratifiedKFold  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    line = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = min(FOLDS, int(np.bincount(targets[split.train]).min()))
    if folds < 2:
        raise ValueError("the linear probe needs two images or more of each class to train on; give more images")
    search = GridSearchCV(
        line,
        {"logisticregression__C": STRENGTHS},
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
    )
    search.fit(vectors[split.train], targets[split.train])
    return float(search.best_params_["logisticregression__C"]), search.predict(vectors[split.test])
