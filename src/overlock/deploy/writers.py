"""What results can be saved as: the one table of endings, and the files behind those that have none of their own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Protocol

from overlock.deploy.coco_results import CocoFile, ImageIds
from overlock.deploy.inputs import Failure
from overlock.deploy.picture import Card, draw_cards, encode, find_format, make_card
from overlock.deploy.result_folder import ResultFolder
from overlock.deploy.results import LabelMap, Objects, Result
from overlock.deploy.tables import CsvFile, JsonFile, JsonLinesFile, ParquetFile
from overlock.deploy.videos import USUAL_RATE, VideoFile, frame_rate
from overlock.files import Outputs

PICTURED = 400
"""Images in a picture of several."""
_log = logging.getLogger(__name__)


class Writer(Protocol):
    """A place where results are kept."""

    def add(self, outcome: Result | Failure) -> None:
        """Take the next one."""

    def close(self) -> None:
        """Write what is left, and what is there of a whole that was cut off."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What writers need to know."""

    task: str
    """'classify', 'detect' or 'segment'."""
    classes: tuple[str, ...]
    """Names of the network's classes."""
    outputs: Outputs
    """What may be written."""
    every: int = 1
    """Of a video, one frame of so many is there."""
    image_ids: ImageIds | None = None
    """Ids for COCO's results, if a file says them."""


class PictureFile:
    """A picture of the first results: the drawing of one alone in its size, cards of several."""

    def __init__(self, path: Path, outputs: Outputs):
        self.path, self.outputs = path, outputs
        self.alone: Objects | LabelMap | None = None
        self.cards: list[Card] = []
        self.count = 0

    def add(self, outcome: Result | Failure) -> None:
        if isinstance(outcome, Failure):
            return
        self.count += 1
        self.alone = outcome if self.count == 1 and isinstance(outcome, (Objects, LabelMap)) else None
        if self.count <= PICTURED:
            self.cards.append(make_card(outcome))

    def close(self) -> None:
        if not self.cards:
            return
        picture = draw_cards(self.cards) if self.alone is None else self.alone.draw()
        self.outputs.replace(self.path, encode(picture, self.path))
        if self.count > PICTURED:
            _log.warning(
                "%s: shows the first %d images, %d more are not on it", self.path, PICTURED, self.count - PICTURED
            )


class DrawnVideo:
    """The drawn frames of a video, at its speed, or images as such frames."""

    def __init__(self, path: Path, saving: Saving):
        self.path, self.saving = path, saving
        self.partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        self.video = VideoFile(self.partial)
        self.size: tuple[int, int] | None = None
        self.rate: Fraction | None = None
        self.fitted = 0

    def add(self, outcome: Result | Failure) -> None:
        if not isinstance(outcome, (Objects, LabelMap)):
            return
        picture = outcome.draw() if isinstance(outcome, Objects) else outcome.draw(legend=False)
        if self.rate is None:
            is_frame = outcome.frame is not None
            self.rate = frame_rate(Path(outcome.source)) / self.saving.every if is_frame else USUAL_RATE
        self.size = self.size or picture.size
        self.fitted += picture.size != self.size
        self.video.add(picture, rate=self.rate)

    def close(self) -> None:
        self.video.close()
        if self.size is not None:
            self.saving.outputs.replace(self.path, self.partial)
        if self.fitted:
            _log.warning(
                "%s: %d frames of another size are fitted into that of the first, %d x %d", self.path, self.fitted,
                *(self.size or ()),
            )  # fmt: skip


class Form(NamedTuple):
    """A form in which results are saved."""

    endings: tuple[str, ...]
    tasks: tuple[str, ...]
    what: str
    open: Callable[[Path, Saving], Writer]


_ALL = ("classify", "detect", "segment")
_DENSE = ("detect", "segment")
_PICTURES = (".png", ".jpg")  # the ones to name; any image format that Pillow writes will do
FORMS = (
    Form((".csv",), _ALL, "a table", lambda path, saving: CsvFile(path, saving.task)),
    Form((".jsonl",), _ALL, "a table", lambda path, _: JsonLinesFile(path)),
    Form((".parquet",), _ALL, "a table", lambda path, saving: ParquetFile(path, saving.task)),
    Form(
        (".json",), ("detect",), "COCO's results", lambda path, saving: CocoFile(path, saving.classes, saving.image_ids)
    ),
    Form((".json",), ("classify", "segment"), "what --json prints", lambda path, _: JsonFile(path)),
    Form(_PICTURES, _ALL, "a picture", lambda path, saving: PictureFile(path, saving.outputs)),
    Form((".mp4",), _DENSE, "a video of the drawn frames", DrawnVideo),
)


def open_writer(name: str, saving: Saving) -> Writer:
    """The file or folder that a name asks for by its ending.

    Args:
        name: with an ending of :data:`FORMS`; one of a folder has none, or ends in a slash.
        saving: what is saved.

    Raises:
        ValueError: for another ending, and where the place may not or cannot be written.
    """
    if not name:
        raise ValueError("an empty word names no file or folder to save results in")
    path = Path(name)
    if is_folder(name) and saving.task in _DENSE:
        return ResultFolder(saving.outputs.claim_folder(path), saving.classes, saving.outputs)
    ending = path.suffix.lower()
    form = next((form for form in FORMS if ending in form.endings and saving.task in form.tasks), None)
    if form is None and find_format(path) is not None:
        form = next(form for form in FORMS if form.endings == _PICTURES)
    if form is None or is_folder(name):
        raise ValueError(f"{name}: {_choices(saving.task)}")
    return form.open(saving.outputs.claim(path), saving)


def is_folder(name: str) -> bool:
    """Whether a name is that of a folder for results, there or not."""
    return not Path(name).suffix or name.endswith(("/", os.sep)) or Path(name).is_dir()


def _choices(task: str) -> str:
    """What results of a task can be saved as."""
    kinds: dict[str, list[str]] = {}
    for form in FORMS:
        if task in form.tasks:
            kinds.setdefault(form.what, []).extend(form.endings)
    parts = [f"{' or '.join(endings)} ({what})" for what, endings in kinds.items()]
    folder = ", or name a folder, without an ending or with a slash behind it" if task in _DENSE else ""
    return f"results of the task {task} are saved as {', '.join(parts[:-1])} or {parts[-1]}{folder}"
