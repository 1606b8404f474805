"""How many pixels each class has, before anything is trained: what cannot be learnt or scored is said at once."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

from overlock.data.label_values import IGNORED, LabelForm

MOST = 200  # maps of a part that are looked at
THREADS = 4


class Maps(Protocol):
    """Label maps by number."""

    folder: Path

    def __len__(self) -> int: ...

    def read_values(self, index: int) -> Any:
        """The numbers in a map (H, W). Raises ValueError where it cannot be read."""
        ...


@dataclass(frozen=True, kw_only=True)
class PixelCounts:
    """Pixels of each class in a part, or in some of its maps."""

    counts: tuple[int, ...]
    """By label."""
    ignored: int
    """Pixels that do not count."""
    maps: int
    """Maps that were looked at."""
    total: int
    """Maps of the part."""
    problems: tuple[str, ...] = ()
    """What is wrong with some of the maps, which count as unreadable images."""


def count_pixels(source: Maps, form: LabelForm, *, doubtful: bool = True) -> PixelCounts:
    """Count the pixels of a part, of up to :data:`MOST` of its maps, evenly spread.

    Args:
        source: the maps.
        form: how their values are read.
        doubtful: whether maps of 0 and 255 alone are refused where 255 is ignored.

    Raises:
        ValueError: where more than half of the maps cannot be read or have values that are no class; where 0 and 255
            are the only values and 255 is ignored; and where no pixel counts.
    """
    places = np.unique(np.linspace(0, len(source) - 1, min(MOST, len(source))).round().astype(int)).tolist()

    def look(place: int) -> Counter[int] | ValueError:
        try:
            values, counts = np.unique(source.read_values(place), return_counts=True)
        except ValueError as error:
            return error
        return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(look, places))
    problems = [one for one in found if isinstance(one, ValueError)]
    if 2 * len(problems) > len(found):
        raise ValueError(f"{len(problems)} of {len(found)} label maps cannot be used; the first: {problems[0]}")
    maps = [one for one in found if not isinstance(one, ValueError)]
    values: Counter[int] = sum(maps, Counter())
    if (
        doubtful
        and not form.values
        and not form.reduce_zero_label
        and form.ignore_index == 255
        and set(values) == {0, 255}
    ):
        raise ValueError(
            f"{source.folder}: the label maps have the values 0 and 255 alone, and 255 is the ignored label; if these "
            "are two classes say --labels 0,255, and if 255 is to be ignored, --labels 0,1 and so on for each class"
        )
    told = [f"{len(problems)} of {len(found)} label maps cannot be used; the first: {problems[0]}"] if problems else []
    told += _check_values(source, form, values, maps)
    counts = [0] * form.num_classes
    ignored = 0
    for value, count in values.items():
        labels, wrong = form.to_labels(np.array([value]))
        if wrong[0]:
            continue
        if labels[0] == IGNORED:
            ignored += count
        else:
            counts[int(labels[0])] += count
    if not any(counts):
        raise ValueError(
            f"{source.folder}: no pixel of {len(maps)} label maps is of a class, all are ignored (the values there are "
            f"{_listed(values)}); check ignore_index, reduce_zero_label and labels"
        )
    return PixelCounts(
        counts=tuple(counts), ignored=ignored, maps=len(maps), total=len(source), problems=tuple(told)
    )  # fmt: skip


def _check_values(source: Maps, form: LabelForm, values: Counter[int], maps: Sequence[Counter[int]]) -> list[str]:
    """What to tell where some of the values are not those of the classes, with what to change.

    Raises:
        ValueError: where those are in most of the maps.
    """
    wrong = [one for one in maps if form.to_labels(np.array(list(one)))[1].any()]
    if not wrong:
        return []
    strange = [value for value in wrong[0] if form.to_labels(np.array([value]))[1].any()]
    mend = form.describe()
    if not form.values and len(values) == form.num_classes:
        mend += f"; these values may be the classes: --labels {','.join(map(str, sorted(values)))}"
    elif (
        not form.values and not form.reduce_zero_label and max(values.keys() - {form.ignore_index}) == form.num_classes
    ):
        mend += "; if 0 is no class say --reduce_zero_label true, and if it is, its name is missing"
    elif len(values) > 2 * form.num_classes + 2:
        mend += "; so many values come of maps that were resized or compressed with blending"
    sentence = (
        f"{source.folder}: {len(wrong)} of {len(maps)} label maps have values that are no class, such as {strange[0]} "
        f"(the values there are {_listed(values)}), where {mend}"
    )
    if 2 * len(wrong) > len(maps):
        raise ValueError(sentence)
    return [sentence]


def _listed(values: Counter[int]) -> str:
    known = sorted(values)
    return ", ".join(map(str, known[:8])) + (f", ... {known[-1]}" if len(known) > 8 else "")


def tell_pixels(parts: Sequence[PixelCounts], classes: Sequence[str]) -> tuple[str, ...]:
    """Notes: a table of the pixels of each class to train on and to test on, and the classes without any.

    Args:
        parts: to train on, and to test on.
        classes: names of the labels.
    """
    looked = " and ".join(f"{part.maps} of {part.total}" for part in parts)
    table = Table("class")
    for name in ("to train on", "to test on"):
        table.add_column(name, justify="right")
    totals = [sum(part.counts) for part in parts]
    for label, name in enumerate(classes):
        table.add_row(name, *(_share(part.counts[label], total) for part, total in zip(parts, totals, strict=True)))
    table.add_row("ignored, of all", *(_share(p.ignored, t + p.ignored) for p, t in zip(parts, totals, strict=True)))
    text = io.StringIO()
    Console(file=text, width=76, color_system=None).print(table, markup=False)
    notes = [f"share of pixels, %, in {looked} label maps to train on and to test on:\n{text.getvalue().rstrip()}"]
    for part, what in zip(parts, ("train", "test"), strict=True):
        notes += part.problems
        absent = [name for name, count in zip(classes, part.counts, strict=True) if count == 0]
        if absent:
            where = "the label maps" if part.maps == part.total else f"{part.maps} of the {part.total} label maps"
            names = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
            notes.append(f"no pixel in {where} to {what} on is of {len(absent)} of the classes: {names}")
    return tuple(notes)


def _share(count: int, total: int) -> str:
    if count == 0:
        return "none"
    return "< 0.01" if count < total / 1e4 else f"{100 * count / total:.2f}"
