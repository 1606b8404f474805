"""Nearest neighbours among embeddings by FAISS, exactly or among inverted lists (IVF)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from overlock.embeddings.shards import Embeddings, Vectors, import_package
from overlock.files import write_atomically

Method = Literal["exact", "ivf"]
QUERIES = 200  # of the vectors themselves, by which the recall of IVF is measured
BLOCK = 1024  # queries at once


class Hits(NamedTuple):
    """The nearest embeddings of some queries, the best first."""

    places: np.ndarray[Any, Any]
    """(Q, K), rows of the embeddings; -1 where IVF found no more."""
    similarities: Vectors
    """(Q, K), cosines."""


class Pairs(NamedTuple):
    """Embeddings that are alike."""

    first: np.ndarray[Any, Any]
    """(P,), rows of the embeddings."""
    second: np.ndarray[Any, Any]
    """(P,), larger ones."""
    similarities: Vectors
    """(P,), cosines."""


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """How neighbours are found."""

    method: Method = "exact"
    """Compare with all vectors, or with those of the inverted lists that are nearest to a query."""
    nlist: int | None = None
    """IVF: number of lists; 4 sqrt(N) unless given, and at most N / 39, which k-means wants."""
    nprobe: int | None = None
    """IVF: lists that a query is compared with; a sixteenth of them, at least 8, unless given."""


class Index:
    """The embeddings of a folder, ready to be searched by cosine.

    The lists of IVF are kept beside the shards, so that they are trained once.

    Args:
        embeddings: to search in.
        options: how.

    Raises:
        ValueError: for options that will not do.
    """

    def __init__(self, embeddings: Embeddings, options: IndexOptions | None = None):
        options = options or IndexOptions()
        self.embeddings, self.faiss = embeddings, import_package("faiss")
        if options.method not in get_args(Method):
            raise ValueError(f"method must be {' or '.join(get_args(Method))}, got {options.method!r}")
        for name in ("nlist", "nprobe"):
            value = getattr(options, name)
            if value is not None and options.method == "exact":
                raise ValueError(f"{name} is for the method ivf; an exact search has no lists")
            if value is not None and not 1 <= value <= len(embeddings):
                raise ValueError(f"{name} must be 1 to {len(embeddings)}, the number of vectors, got {value}")
        if options.method == "exact":
            self.index: Any = self.faiss.IndexFlatIP(embeddings.origin.dim)
            self.index.add(embeddings.vectors)
            return
        count = len(embeddings)
        nlist = options.nlist or max(1, min(round(4 * math.sqrt(count)), count // 39))
        self.index = self._inverted_lists(nlist)
        self.index.nprobe = min(nlist, options.nprobe or max(8, nlist // 16))

    def search(self, queries: Vectors, top: int) -> Hits:
        """The nearest embeddings of queries (Q, D), each of length 1."""
        similarities, places = self.index.search(np.ascontiguousarray(queries), min(top, len(self.embeddings)))
        return Hits(places, similarities)

    def pairs(self, threshold: float) -> Pairs:
        """All pairs whose cosine is above a threshold."""
        found: list[tuple[Vectors, Vectors, Vectors]] = []
        vectors = self.embeddings.vectors
        for start in range(0, len(vectors), BLOCK):
            limits, similarities, others = self.index.range_search(vectors[start : start + BLOCK], threshold)
            own = start + np.repeat(np.arange(len(limits) - 1), np.diff(limits.astype(np.int64)))
            later = others > own
            found.append((own[later], others[later], similarities[later]))
        return Pairs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def recall(self, top: int = 10, *, seed: int = 0) -> float:
        """Share of the true nearest embeddings that are found, of up to 200 of the embeddings as queries."""
        count = len(self.embeddings)
        queries = self.embeddings.vectors[np.random.default_rng(seed).permutation(count)[:QUERIES]]
        mine, true = self.search(queries, top).places, Index(self.embeddings).search(queries, top).places
        return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(mine, true, strict=True)]))

    def _inverted_lists(self, nlist: int) -> Any:
        """Those of the folder, trained where they are not there yet."""
        origin = self.embeddings.origin
        digest = hashlib.blake2b(self.embeddings.vectors.data, digest_size=8).hexdigest()
        path = self.embeddings.folder / f"_ivf-{nlist}-{digest}.faiss"  # readers of Parquet skip names with _
        if path.is_file():
            return self.faiss.deserialize_index(np.frombuffer(path.read_bytes(), dtype=np.uint8))
        quantizer = self.faiss.IndexFlatIP(origin.dim)
        index = self.faiss.IndexIVFFlat(quantizer, origin.dim, nlist, self.faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # of few vectors no warning: the recall says what they do
        index.train(self.embeddings.vectors)
        index.add(self.embeddings.vectors)
        write_atomically(path, self.faiss.serialize_index(index).tobytes())
        return index


def open_index(folder: Path, options: IndexOptions | None = None) -> Index:
    """The index of a folder that ``overlock embed`` wrote.

    Raises:
        ValueError: as :class:`Embeddings` and :class:`Index`.
    """
    return Index(Embeddings(folder), options)
