"""Embeddings on the disk: Parquet shards, each with what it was made from in its metadata."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from overlock.extras import needing
from overlock.files import write_atomically

if TYPE_CHECKING:
    import pyarrow

METADATA_KEY = b"overlock"
PATTERN = "embeddings-*-of-*.parquet"
PARTIAL = f".{PATTERN}.*"
"""Of files that a killed process was writing."""
PLACES = ("source", "checkpoint")
"""Fields of an origin that say where something lies, and not what it is."""
CALLED = dict(images="number of images", digest="list of images", dim="length of vectors")
"""What messages call fields of an origin whose names say too little."""
Vectors = np.ndarray[Any, Any]


def import_package(module: str) -> Any:
    """A package of the extra ``embed``, with a module of it.

    Raises:
        ImportError: where it is not installed.
    """
    package = module.partition(".")[0]
    with needing(f"embeddings need {package}", "embed"):
        importlib.import_module(module)
    return sys.modules[package]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What embeddings were made from; shards of one folder have the same."""

    source: str
    """Absolute path of the folder or tar file of the images."""
    images: int
    """How many there are."""
    digest: str
    """Of their ids and lengths."""
    checkpoint: str | None
    """Of the network, as it was named; None for the one that comes with the package."""
    model: str
    """timm's name of it."""
    weights: str
    """Digest of its weights."""
    preprocessing: dict[str, Any]
    """Of the images: timm's data configuration."""
    precision: str
    dim: int
    """Length of a vector."""
    batch_size: int
    """Images a pass, on which the last bits of vectors may depend."""
    shard_images: int
    """Images a shard."""

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.images // self.shard_images)

    def path(self, folder: Path, shard: int) -> Path:
        """Of a shard's file."""
        return folder / f"embeddings-{shard:05d}-of-{self.shards:05d}.parquet"

    def length(self, shard: int) -> int:
        """Images in a shard."""
        return min(self.shard_images, self.images - shard * self.shard_images)

    def batches(self, shard: int) -> Iterator[range]:
        """The places of a shard's images, batch by batch."""
        first = shard * self.shard_images
        end = first + self.length(shard)
        for start in range(first, end, self.batch_size):
            yield range(start, min(start + self.batch_size, end))

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    def differing(self, other: Origin) -> list[str]:
        """In what another origin differs; images and network may have moved to another place."""
        ours, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        return [CALLED.get(name, name) for name in ours if ours[name] != theirs[name] and name not in PLACES]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of an image."""

    id: str
    label: str | None
    size: tuple[int, int] | None = None
    """Width and height in pixels; None for an unreadable image."""
    vector: Vectors | None = None
    """(D,) float32; None where there is none."""
    error: str | None = None
    """Why there is none."""


def write_shard(path: Path, rows: Sequence[Row], origin: Origin) -> None:
    """Write a shard whole or not at all; the same rows give the same bytes.

    Raises:
        ValueError: where it cannot be written.
    """
    pa = import_package("pyarrow.parquet")
    missing = np.array([row.vector is None for row in rows])
    nothing = np.zeros(origin.dim, dtype=np.float32)
    flat = np.concatenate([nothing if row.vector is None else row.vector for row in rows])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), origin.dim, mask=pa.array(missing))
    sizes = [row.size or (None, None) for row in rows]
    table = pa.table(
        dict(
            id=pa.array([row.id for row in rows], pa.string()),
            vector=vectors,
            label=pa.array([row.label for row in rows], pa.string()),
            width=pa.array([width for width, _ in sizes], pa.int32()),
            height=pa.array([height for _, height in sizes], pa.int32()),
            error=pa.array([row.error for row in rows], pa.string()),
        )
    ).replace_schema_metadata({METADATA_KEY: origin.to_json().encode()})
    buffer = io.BytesIO()
    pa.parquet.write_table(table, buffer, compression="zstd", use_dictionary=["label"])
    write_atomically(path, buffer.getvalue())


def read_origin(path: Path) -> Origin | None:
    """What a shard was made from; None for a file that is no whole shard of ours."""
    pa = import_package("pyarrow.parquet")
    try:
        metadata = pa.parquet.read_schema(path).metadata or {}
        return Origin(**json.loads(metadata[METADATA_KEY]))
    except (OSError, KeyError, TypeError, ValueError):  # pyarrow's own errors are of the first and last kind
        return None


def read_problems(path: Path) -> list[str]:
    """The images of a shard that have no vector, and why."""
    pa = import_package("pyarrow.parquet")
    table = pa.parquet.read_table(path, columns=["id", "error"])
    rows = table.filter(table.column("error").is_valid()).to_pylist()
    return [f"{row['id']}: {row['error']}" for row in rows]


class Embeddings:
    """All embeddings of a folder, in memory.

    Args:
        folder: that ``overlock embed`` wrote.

    Raises:
        ValueError: for another folder, an unfinished one, and one of several networks or sources.
    """

    def __init__(self, folder: Path):
        pa = import_package("pyarrow.parquet")
        paths = sorted(folder.glob(PATTERN))
        if not paths:
            raise ValueError(f"{folder}: no embeddings here; make them with: overlock embed IMAGES --out {folder}")
        origins = {path: read_origin(path) for path in paths}
        origin = next((own for own in origins.values() if own is not None), None)
        for path, own in origins.items():
            if own is None or origin is None:
                raise ValueError(f"{path}: this shard is damaged; embed the images again with --overwrite")
            if changed := own.differing(origin):
                why = f"of another {', '.join(changed)} than the first"
                raise ValueError(f"{path}: this shard is {why}; embed the images again with --overwrite")
        assert origin is not None  # as there are paths
        absent = [path for i in range(origin.shards) if not (path := origin.path(folder, i)).is_file()]
        if absent:
            raise ValueError(
                f"{folder}: {len(absent)} of {origin.shards} shards are not there yet (first: {absent[0].name}); give "
                "the same command of overlock embed again, which goes on from here"
            )
        self.folder, self.origin = folder, origin
        columns = ["id", "vector", "label", "error"]
        shards = [origin.path(folder, i) for i in range(origin.shards)]
        self.table: pyarrow.Table = pa.concat_tables(pa.parquet.read_table(path, columns=columns) for path in shards)
        self.failed = self.table.column("vector").null_count
        """Images without a vector."""
        self.places = np.flatnonzero(self.table.column("vector").is_valid().to_numpy())
        """(N,), of the images with a vector, among those of the source."""
        if len(self.places) == 0:
            raise ValueError(f"{folder}: none of the {origin.images} images could be read, so there are no vectors")

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def ids(self) -> list[str]:
        """Of the images with a vector."""
        return self._column("id")

    @cached_property
    def labels(self) -> list[str | None]:
        """Likewise."""
        return self._column("label")

    @cached_property
    def vectors(self) -> Vectors:
        """(N, D), float32, each of length 1, so that products are cosines."""
        valid = self.table.column("vector").drop_null().combine_chunks()
        vectors = valid.flatten().to_numpy(zero_copy_only=False).reshape(len(self.places), self.origin.dim)
        return normalise(vectors)

    def _column(self, name: str) -> list[Any]:
        return self.table.column(name).take(self.places).to_pylist()


def normalise(vectors: Vectors) -> Vectors:
    """Vectors (N, D) of length 1; those of length 0 stay so."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)
