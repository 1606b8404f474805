"""Results as rows of a table or as JSON, written while they come."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from overlock.deploy.inputs import Failure
from overlock.deploy.results import LabelMap, Objects, Prediction, Result
from overlock.extras import needing
from overlock.files import unwritable

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


class TextFile:
    """A new text file.

    Raises:
        ValueError: where it cannot be written, in each method.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("w", encoding="utf-8", newline="")
        except OSError as error:
            raise unwritable(path, error) from None

    def write(self, text: str) -> int:
        try:
            return self.file.write(text)
        except OSError as error:  # say a full disk
            raise unwritable(self.path, error) from None

    def close(self) -> None:
        try:
            self.file.close()
        except OSError as error:
            raise unwritable(self.path, error) from None


class CsvFile:
    """A CSV file with the rows of :func:`rows_of`.

    Raises:
        ValueError: where it cannot be written.
    """

    def __init__(self, path: Path, task: str):
        self.file = TextFile(path)
        self.writer = csv.DictWriter(self.file, [*COLUMNS[task], "error"], lineterminator="\n")
        self.writer.writeheader()

    def add(self, outcome: Result | Failure) -> None:
        self.writer.writerows(rows_of(outcome))

    def close(self) -> None:
        self.file.close()


class JsonLinesFile:
    """A file with the JSON of :func:`describe` in each line.

    Raises:
        ValueError: where it cannot be written.
    """

    def __init__(self, path: Path):
        self.file = TextFile(path)

    def add(self, outcome: Result | Failure) -> None:
        self.file.write(json.dumps(describe(outcome), ensure_ascii=False) + "\n")

    def close(self) -> None:
        self.file.close()


class JsonArray:
    """A list in JSON that is written entry by entry.

    Args:
        place: a new file's path, or a stream, which stays open.

    Raises:
        ValueError: where the file cannot be written.
    """

    def __init__(self, place: Path | TextIO):
        self.is_own = isinstance(place, Path)
        self.file: TextFile | TextIO = TextFile(place) if isinstance(place, Path) else place
        self.count = 0

    def add(self, entry: Any, *, indent: int | None = None) -> None:
        text = json.dumps(entry, indent=indent, ensure_ascii=False)
        lines = (f"  {line}" if indent else line for line in text.splitlines())
        self.file.write(("[\n" if self.count == 0 else ",\n") + "\n".join(lines))
        self.count += 1

    def close(self) -> None:
        self.file.write("\n]\n" if self.count else "[]\n")
        if self.is_own:
            self.file.close()


class JsonFile:
    """All results as a list in JSON, by :func:`describe`, in a file or a stream.

    Raises:
        ValueError: where the file cannot be written.
    """

    def __init__(self, place: Path | TextIO):
        self.array = JsonArray(place)

    def add(self, outcome: Result | Failure) -> None:
        self.array.add(describe(outcome), indent=2)

    def close(self) -> None:
        self.array.close()


class ParquetFile:
    """A Parquet file with the rows of :func:`rows_of`, written in groups.

    Raises:
        ImportError: without pyarrow.
        ValueError: where the file cannot be written.
    """

    def __init__(self, path: Path, task: str):
        with needing(f"{path}: Parquet needs pyarrow", "parquet"):
            import pyarrow  # noqa: PLC0415
            from pyarrow import parquet  # noqa: PLC0415
        self.schema = pyarrow.schema([*COLUMNS[task].items(), ("error", "string")])
        self.make = pyarrow.Table.from_pylist
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.writer = parquet.ParquetWriter(path, self.schema)
        except OSError as error:
            raise unwritable(path, error) from None
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
