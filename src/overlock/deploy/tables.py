"""Results as rows of a table, written while they come: CSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from overlock.deploy.inputs import Failure
from overlock.deploy.results import LabelMap, Objects, Prediction, Result
from overlock.files import unwritable

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
ROW_GROUP = 4096
Row = dict[str, Any]
COLUMNS: dict[str, dict[str, str]] = {
    "classify": dict(source="string", frame="int64", rank="int64", label="string", probability="double"),
    "detect": dict(
        source="string", frame="int64", label="string", score="double",
        left="double", top="double", right="double", bottom="double",
    ),
    "segment": dict(source="string", frame="int64", label="string", share="double"),
}  # fmt: skip
"""Of each task, in pixels and shares; behind them comes ``error``."""


def describe(outcome: Result | Failure) -> Row:
    """A result as JSON has it; of a failure ``error`` says why there is none."""
    row: Row = dict(source=outcome.source)
    if outcome.frame is not None:
        row["frame"] = outcome.frame
    if isinstance(outcome, Failure):
        return row | dict(error=outcome.reason)
    if isinstance(outcome, Prediction):
        return row | dict(labels=list(outcome.labels), probabilities=list(outcome.probabilities))
    if isinstance(outcome, LabelMap):
        return row | dict(shares=outcome.shares())
    assert isinstance(outcome, Objects)
    objects = zip(outcome.labels, outcome.scores, outcome.boxes, strict=True)
    return row | dict(objects=[dict(label=label, score=score, box=list(box)) for label, score, box in objects])


def rows_of(outcome: Result | Failure) -> Iterator[Row]:
    """A row for each class or object, by :data:`COLUMNS`; one alone with the image where there is none."""
    common: Row = dict(source=outcome.source, frame=outcome.frame)
    rows: list[Row] = []
    if isinstance(outcome, Failure):
        rows = [dict(error=outcome.reason)]
    elif isinstance(outcome, Prediction):
        classes = zip(outcome.labels, outcome.probabilities, strict=True)
        rows = [dict(rank=i, label=label, probability=share) for i, (label, share) in enumerate(classes, start=1)]
    elif isinstance(outcome, LabelMap):
        rows = [dict(label=label, share=share) for label, share in outcome.shares().items()]
    elif isinstance(outcome, Objects):
        sides = ("left", "top", "right", "bottom")
        objects = zip(outcome.labels, outcome.scores, outcome.boxes, strict=True)
        rows = [dict(label=label, score=score, **dict(zip(sides, box, strict=True))) for label, score, box in objects]
    for row in rows or [{}]:
        yield common | row


class Table(Protocol):
    """A file that results are added to."""

    def add(self, outcome: Result | Failure) -> None: ...
    def close(self) -> None: ...


def open_table(path: Path, task: str) -> Table:
    """A new file, of the form that its ending says.

    Raises:
        ValueError: where it cannot be written, or pyarrow is not there for Parquet.
    """
    columns = [*COLUMNS[task], "error"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            return _Csv(path, columns)
        return _JsonLines(path) if path.suffix == ".jsonl" else _Parquet(path, task)
    except OSError as error:
        raise unwritable(path, error) from None


class _Csv:
    def __init__(self, path: Path, columns: Sequence[str]):
        self.file = path.open("w", encoding="utf-8", newline="")
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")
        self.writer.writeheader()

    def add(self, outcome: Result | Failure) -> None:
        self.writer.writerows(rows_of(outcome))

    def close(self) -> None:
        self.file.close()


class _JsonLines:
    def __init__(self, path: Path):
        self.file = path.open("w", encoding="utf-8")

    def add(self, outcome: Result | Failure) -> None:
        self.file.write(json.dumps(describe(outcome), ensure_ascii=False) + "\n")

    def close(self) -> None:
        self.file.close()


class _Parquet:
    def __init__(self, path: Path, task: str):
        try:
            import pyarrow  # noqa: PLC0415
            from pyarrow import parquet  # noqa: PLC0415
        except ImportError:
            raise ValueError(
                f"{path}: Parquet needs pyarrow; install it with: pip install 'overlock[parquet]'"
            ) from None
        self.schema = pyarrow.schema([*COLUMNS[task].items(), ("error", "string")])
        self.make, self.writer = pyarrow.Table.from_pylist, parquet.ParquetWriter(path, self.schema)
        self.rows: list[Row] = []

    def add(self, outcome: Result | Failure) -> None:
        self.rows += rows_of(outcome)
        if len(self.rows) >= ROW_GROUP:
            self._write()

    def close(self) -> None:
        self._write()
        self.writer.close()

    def _write(self) -> None:
        if self.rows:
            self.writer.write_table(self.make(self.rows, schema=self.schema))
        self.rows = []
