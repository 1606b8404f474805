"""Near-duplicates: images whose embeddings are almost the same, as groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from overlock.embeddings.index import Index, Pairs

THRESHOLD = 0.99


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images each of which is like another one of them."""

    places: tuple[int, ...]
    """Rows of the embeddings."""
    similarity: float
    """The least cosine of those pairs that hold it together."""


def check_threshold(threshold: float) -> None:
    """Raise ValueError for what is no cosine of vectors that are alike."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and up to 1, the cosine of equal vectors, got {threshold}")


def group_labels(pairs: Pairs, count: int) -> np.ndarray:
    """Which group each of so many embeddings is in, (N,), most of them alone in theirs."""
    from scipy.sparse import coo_array  # noqa: PLC0415
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    graph = coo_array((np.ones(len(pairs.first), dtype=bool), (pairs.first, pairs.second)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def find_duplicates(index: Index, threshold: float = THRESHOLD) -> list[Group]:
    """Groups of near-duplicates, the largest first.

    Args:
        index: of the embeddings.
        threshold: cosine above which two images are alike.

    Raises:
        ValueError: for a threshold outside (0, 1].
    """
    check_threshold(threshold)
    pairs = index.pairs(threshold)
    labels = group_labels(pairs, len(index.embeddings))
    least = np.ones(labels.max(initial=-1) + 1)
    np.minimum.at(least, labels[pairs.first], pairs.similarities)
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    groups = np.split(order, np.cumsum(sizes)[:-1])
    found = [
        Group(places=tuple(group.tolist()), similarity=float(least[label]))
        for label, group in enumerate(groups)
        if len(group) > 1
    ]
    return sorted(found, key=lambda group: (-len(group.places), group.places))
