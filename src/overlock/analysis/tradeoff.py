"""Accuracy against what it costs (Figure 1): published figures, measured latency, and the Pareto fronts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from overlock.analysis.published import PublishedModel, find_published, read_published
from overlock.analysis.runtime_study import Subject, Trial, count
from overlock.analysis.runtimes import PREFIX, architecture_of

DISTILLED = "distilled"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A network in the picture."""

    method: str
    """As papers have it, or timm's name."""
    model: str
    """timm's name, empty where it has none."""
    image_size: int | None
    """Side in pixels of a classifier's images."""
    score: float | None
    """Published; None where none is for this size of images."""
    macs: float
    """Multiply-adds in G, published where they are."""
    params: float
    """Parameters in M, published where they are."""
    trial: Trial | None = None
    """What was measured."""
    note: str = ""
    source: str = ""

    @property
    def batch(self) -> int | None:
        return None if self.trial is None else self.trial.batch

    @property
    def milliseconds_an_image(self) -> float:
        """Of a call, over the images of the batch; for measured points."""
        assert self.trial is not None
        return 1e3 / self.trial.images_per_second

    @property
    def is_ours(self) -> bool:
        return self.method.startswith("OverLoCK") or self.model.startswith(PREFIX)

    @property
    def is_of_paper(self) -> bool:
        """Whether the paper compares with it."""
        return self.source.startswith("OverLoCK")

    @property
    def is_distilled(self) -> bool:
        return self.note == DISTILLED


def make_points(
    task: str, measured: Mapping[Subject, Trial], accuracies: Mapping[str, float] | None = None
) -> list[Point]:
    """A point for each published network of a task, then one for each that was measured, of any task's classifiers.

    Args:
        task: a name in ``SCORES``.
        measured: by :func:`overlock.analysis.runtime_study.measure_latency`.
        accuracies: of the models that were measured, in percent of some images; then the published networks, whose
            accuracies are of others, are left out.
    """
    if accuracies is not None:
        return [_trained(subject, trial, accuracies[subject.model]) for subject, trial in measured.items()]
    points = [_published(row) for row in read_published() if row.task == task]
    return points + [_measured(subject, trial) for subject, trial in measured.items()]


def _published(row: PublishedModel) -> Point:
    return Point(
        method=row.method, model=row.model, image_size=row.image_size, score=row.score, macs=row.macs,
        params=row.params, note=row.note, source=row.source,
    )  # fmt: skip


def _measured(subject: Subject, trial: Trial) -> Point:
    row = find_published(subject.model)
    known: dict[str, Any] = dict(model=subject.model, image_size=subject.image_size, trial=trial)
    if row is not None and row.image_size == subject.image_size:
        return Point(
            method=row.method, score=row.score, macs=row.macs, params=row.params, note=row.note, source=row.source,
            **known,
        )  # fmt: skip
    note = "no published accuracy" + (f" at {subject.image_size} pixels" if row is not None else "")
    point = _trained(subject, trial, None, note)
    return point if row is None else replace(point, method=row.method)


def _trained(subject: Subject, trial: Trial, score: float | None, note: str = "") -> Point:
    macs, params = count(subject)
    return Point(
        method=Path(subject.model).name, model=architecture_of(subject.model), image_size=subject.image_size,
        score=score, macs=macs, params=params, trial=trial, note=note, source="counted",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A cost, and the points that have it."""

    name: str
    """A column."""
    title: str
    points: tuple[Point, ...]
    cost: Callable[[Point], float]
    is_measured: bool = False
    """Whether the cost was measured here."""

    def front(self) -> list[Point]:
        """The Pareto front of all points, the cheapest first; see :func:`pareto_front`."""
        return pareto_front(self.points, self.cost)

    def paper_front(self) -> list[Point]:
        """That of the methods of the paper's tables."""
        return pareto_front([point for point in self.points if point.is_of_paper], self.cost)


def pareto_front(points: Iterable[Point], cost: Callable[[Point], float]) -> list[Point]:
    """Points than which none is as cheap and better, or cheaper and as good. Of several alike, all are on it.

    Networks that a larger one taught are left out: they would win by their teacher.
    """
    ordered = sorted((point for point in points if not point.is_distilled), key=lambda p: (cost(p), -_score(p)))
    front: list[Point] = []
    for point in ordered:
        alike = front and (cost(front[-1]), _score(front[-1])) == (cost(point), _score(point))
        if not front or alike or _score(point) > _score(front[-1]):
            front.append(point)
    return front


def _score(point: Point) -> float:
    assert point.score is not None
    return point.score


def make_axes(points: Iterable[Point]) -> list[Axis]:
    """Multiply-adds and parameters of all that is published, or else was measured; latency, for each batch, of what was
    measured.
    """
    scored = [point for point in points if point.score is not None]
    batches = list(dict.fromkeys(point.batch for point in scored if point.trial is not None))
    published = [point for point in scored if point.trial is None]
    known = tuple(published or (point for point in scored if point.batch == batches[0]))
    axes = [
        Axis(name="macs", title="multiply-adds, G", points=known, cost=lambda point: point.macs),
        Axis(name="params", title="parameters, M", points=known, cost=lambda point: point.params),
    ]
    for batch in batches:
        axes.append(
            Axis(
                name=f"latency_batch{batch}",
                title="latency of one image, ms" if batch == 1 else f"time of an image, in batches of {batch}, ms",
                points=tuple(point for point in scored if point.batch == batch),
                cost=lambda point: point.milliseconds_an_image,
                is_measured=True,
            )
        )
    return axes


def make_rows(points: Sequence[Point], axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """For CSV and JSON: a row for each point, and the names of the fronts that it is on."""
    fronts = {axis.name: axis.front() for axis in axes} | {f"{axis.name}_of_paper": axis.paper_front() for axis in axes}
    rows = []
    for point in points:
        trial = point.trial
        rows.append(
            dict(
                method=point.method, model=point.model, image_size=point.image_size, score=point.score,
                macs=point.macs, params=point.params, batch=point.batch,
                runtime=None if trial is None else trial.runtime,
                milliseconds=None if trial is None else trial.milliseconds,
                spread=None if trial is None else trial.spread,
                images_per_second=None if trial is None else trial.images_per_second,
                fronts=" ".join(name for name, front in fronts.items() if point in front), note=point.note,
                source=point.source,
            )
        )  # fmt: skip
    return rows
