"""WebDataset shards out of a folder of images."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from overlock.data.images import load_folder
from overlock.files import Outputs, write_atomically


def pack(
    source: Path,
    target: Path,
    *,
    shard_images: int = 10_000,
    seed: int = 0,
    overwrite: bool = False,
    tell: Callable[[str], object] | None = None,
) -> list[Path]:
    """Write shards of shuffled images, with timm's ``_info.json`` and ``classes.txt`` beside them.

    Args:
        source: a folder of images by class; see :func:`overlock.data.load_data`.
        target: a new or empty folder.
        shard_images: images a shard.
        seed: of the order, and of the split where the folder has none.
        overwrite: take a folder that holds files already, and replace shards of the same names.
        tell: called with each note on what was left out.

    Returns:
        The shards.

    Raises:
        ValueError: for a source or target that will not do.
    """
    if shard_images < 1:
        raise ValueError(f"shard_images must be at least 1, got {shard_images}")
    Outputs([source], overwrite=overwrite).check_folder(target)
    data = load_folder(source, seed=seed)
    if tell is not None:
        for note in data.notes:
            tell(note)
    splits: dict[str, Any] = {}
    shards: list[Path] = []
    for name, samples in (("train", data.train), ("validation", data.test)):
        order = np.random.default_rng(seed).permutation(len(samples))
        names, lengths = [], []
        for number, start in enumerate(range(0, len(order), shard_images)):
            chosen = order[start : start + shard_images]
            names.append(f"{name}-{number:05d}.tar")
            lengths.append(len(chosen))
            shards.append(target / names[-1])
            write_atomically(shards[-1], _make_shard([samples[i] for i in chosen], start))
        splits[name] = dict(name=name, num_samples=len(order), filenames=names, shard_lengths=lengths)
    write_atomically(target / "classes.txt", "".join(f"{name}\n" for name in data.classes))
    write_atomically(target / "_info.json", json.dumps(dict(splits=splits), indent=2))
    return shards


def _make_shard(samples: list[tuple[Any, int]], start: int) -> bytes:
    """Each image under a number and the ending .jpg, whatever its format: readers tell that from the content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, (path, label) in enumerate(samples, start):
            for ending, content in (("jpg", path.read_bytes()), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{number:08d}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
