"""Embeddings made for the tests: of chosen vectors, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from overlock.embeddings.shards import Embeddings, Origin, Row, write_shard


def make_embeddings(
    folder: Path, vectors: np.ndarray, *, ids: Sequence[str] | None = None, labels: Sequence[str | None] | None = None
) -> Embeddings:
    """Vectors (N, D) in shards of ten."""
    count, dim = vectors.shape
    origin = Origin(
        source="/nowhere", images=count, digest="0", checkpoint=None, model="overlock_atto", weights="0",
        preprocessing={}, precision="fp32", dim=dim, batch_size=5, shard_images=10,
    )  # fmt: skip
    ids = ids or [f"{i:03d}.png" for i in range(count)]
    labels = labels or [None] * count
    rows = [
        Row(id=name, label=label, size=(4, 3), vector=vector.astype(np.float32))
        for name, label, vector in zip(ids, labels, vectors, strict=True)
    ]
    for shard in range(origin.shards):
        write_shard(origin.path(folder, shard), rows[10 * shard : 10 * shard + 10], origin)
    return Embeddings(folder)
