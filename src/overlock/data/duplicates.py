"""Images that stand in a data set more than once: in two classes, or to train on and to test on."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST = 20_000  # images that are compared; more take too long before a run


def tell_duplicates(
    train: Sequence[tuple[Any, int]], test: Sequence[tuple[Any, int]], classes: Sequence[str]
) -> tuple[str, ...]:
    """Notes of images that are the same, byte for byte, in two classes or in both parts.

    Only files of the same length are read. Of more than 20 000 files none is.

    Args:
        train: files and labels.
        test: likewise.
        classes: names of the labels.
    """
    if len(train) + len(test) > MOST:
        return ()
    places = [(path, label, part) for part, samples in enumerate((train, test)) for path, label in samples]
    by_length: dict[int, list[tuple[Path, int, int]]] = defaultdict(list)
    for place in places:
        if isinstance(place[0], Path):
            by_length[place[0].stat().st_size].append(place)
    by_content: dict[bytes, list[tuple[Path, int, int]]] = defaultdict(list)
    for same in by_length.values():
        if len({place[1:] for place in same}) > 1:
            for place in same:
                by_content[hashlib.blake2b(place[0].read_bytes()).digest()].append(place)
    notes = []
    groups = list(by_content.values())
    two_classes = [group for group in groups if len({label for _, label, _ in group}) > 1]
    if two_classes:
        first = next(place for place in two_classes[0] if place[1] != two_classes[0][0][1])
        names = " and ".join(repr(classes[label]) for label in (two_classes[0][0][1], first[1]))
        notes.append(
            f"{len(two_classes)} images stand in two classes (first: {two_classes[0][0][0]} and {first[0]}, in {names})"
        )
    both = [group for group in groups if {part for _, _, part in group} == {0, 1}]
    if both:
        leaked = sum(part for group in both for _, _, part in group)
        example = next(path for path, _, part in both[0] if part)
        notes.append(f"{leaked} images to test on are to train on too, which flatters the score (first: {example})")
    return tuple(notes)
