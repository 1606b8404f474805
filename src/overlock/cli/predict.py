"""``overlock predict IMAGE ...``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from overlock.cli.command import Command, add_overwrite, add_runtime

if TYPE_CHECKING:
    from overlock.deploy.inputs import Failure
    from overlock.deploy.results import Result
    from overlock.deploy.sources import Sources
    from overlock.deploy.stream import ImagePredictor

SHOWN, PICTURED = 100, 400  # images in the table at the terminal, and in a picture of all
SOME_FAILED, ALL_FAILED = 1, 2
SETTINGS = dict(
    classify=("top",), detect=("threshold", "max_detections", "nms_iou"), segment=("scales", "flip", "window", "stride")
)
"""Options of each task."""


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        type=str,
        metavar="IMAGE",
        help="Image files, folders of them, patterns ('photos/**/*.jpg'), .txt files of paths, videos, or - for paths "
        "from standard input.",
    )
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        default=None,
        help="Folder of a run, hf-hub:USER/NAME, or a file of weights; without it a small model that comes with "
        "the package and knows the ten classes of CIFAR-10.",
    )
    parser.add_argument(
        "--task",
        type=Literal["classify", "detect", "segment"] | None,
        default=None,
        help="What the checkpoint is for; it says so itself.",
    )
    parser.add_argument("--model", type=str | None, default=None, help="Model of a checkpoint that does not say.")
    parser.add_argument("--top", type=int, default=5, help="classify: how many classes to show.")
    parser.add_argument("--threshold", type=float, default=0.5, help="detect: score from which on an object counts.")
    parser.add_argument(
        "--max_detections", type=int | None, default=None, help="detect: most objects of an image; 100 unless given."
    )
    parser.add_argument(
        "--nms_iou", type=float | None, default=None,
        help="detect: overlap from which on one of two boxes of a class is dropped; 0.5 unless given.",
    )  # fmt: skip
    parser.add_argument("--scales", type=list[float], default=[1.0], help="segment: e.g. [0.5,1,1.5], their mean.")
    parser.add_argument("--flip", action="store_true", help="segment: take the mean with the mirrored image.")
    parser.add_argument("--window", type=int | None, default=None, help="segment: slide a window of this side.")
    parser.add_argument("--stride", type=int | None, default=None, help="segment: its step, by default two thirds.")
    parser.add_argument(
        "--batch_size", type=int | None, default=None, help="Images a pass: 32 unless given; detect, segment: 1."
    )
    parser.add_argument("--workers", type=int, default=2, help="Threads that load images.")
    add_runtime(parser)
    parser.add_argument(
        "--max_pixels", type=int | None, default=None, help="Pixels of the largest image; 178956970 unless given."
    )
    parser.add_argument("--every", type=int, default=1, help="Of a video, take one frame of so many.")
    parser.add_argument("--strict", action="store_true", help="End at the first image that cannot be read.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument(
        "--save",
        action="append",
        type=str,
        default=[],
        help="May be given several times. FILE.csv, .jsonl or .parquet: all results, written as they come. classify: "
        f"FILE.png, a picture of up to {PICTURED} images. detect, segment: a folder for a picture of each image, and "
        "for the objects in COCO's form or the label maps.",
    )
    add_overwrite(parser)


def run(options: Namespace, console: Console) -> int:
    from overlock.deploy.sources import expand  # noqa: PLC0415

    if options.max_pixels is not None:
        _raise_limit(options.max_pixels)
    if options.checkpoint is None and options.model is not None:
        raise ValueError(f"--model {options.model} says what a checkpoint holds; give one with --checkpoint")
    if options.checkpoint is None and options.task not in (None, "classify"):
        raise ValueError(f"--task {options.task} needs a trained network; give one with --checkpoint")
    folders = [Path(name) for name in options.save if not Path(name).suffix]
    sources = expand(options.images, every=options.every, results=folders[0] if folders else None)
    predictor = _make_predictor(options)
    settings = {name: options[name] for name in SETTINGS[predictor.task]}
    outcomes = predictor.stream(
        sources.images, batch_size=options.batch_size, workers=options.workers, keep_images=bool(options.save),
        **settings,
    )  # fmt: skip
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    done = failed = 0
    with ExitStack() as stack:
        writers = [_Printed(console, predictor.task, options.json), *_make_writers(options, predictor, sources)]
        for writer in writers:  # what was found is kept, whatever ends the command
            stack.callback(writer.close)
        for note in sources.notes:
            errors.print(note)
        for outcome in _with_progress(outcomes, sources.count, predictor.task):
            if _is_failure(outcome):
                failed += 1
                errors.print(f"skipped {outcome.sentence}")
            else:
                done += 1
            for writer in writers:
                writer.add(outcome)
            if failed and options.strict:
                return ALL_FAILED
    if failed:
        errors.print(f"{failed} of {failed + done} images skipped")
    return 0 if not failed else SOME_FAILED if done else ALL_FAILED


def _raise_limit(pixels: int) -> None:
    """Pillow refuses images of more than twice its number; the process is the command's own."""
    from PIL import Image  # noqa: PLC0415

    if pixels < 1:
        raise ValueError(f"--max_pixels must be at least 1, got {pixels}")
    Image.MAX_IMAGE_PIXELS = (pixels + 1) // 2


def _make_predictor(options: Namespace) -> ImagePredictor[Any]:
    """Of the checkpoint's task."""
    from overlock.deploy import Detector, Predictor, Segmenter  # noqa: PLC0415

    runtime = dict(device=options.device, precision=options.precision)
    if options.checkpoint is None:
        predictor = Predictor.default(**runtime)
        _introduce(predictor)
        return predictor
    from overlock.checkpoint import load_model  # noqa: PLC0415
    from overlock.hub import find_weights  # noqa: PLC0415

    network, record = load_model(find_weights(options.checkpoint), model=options.model)
    if options.task not in (None, record.task):
        raise ValueError(f"{options.checkpoint}: a {record.name} is for --task {record.task}, not {options.task}")
    kinds: dict[str, Any] = dict(classify=Predictor, detect=Detector, segment=Segmenter)
    return kinds[record.task](network, record, **runtime)


def _make_writers(options: Namespace, predictor: ImagePredictor[Any], sources: Sources) -> list[Any]:
    """What each --save asks for."""
    from overlock.deploy.dense_files import ResultFolder  # noqa: PLC0415
    from overlock.deploy.picture import check_picture  # noqa: PLC0415
    from overlock.deploy.tables import TABLE_SUFFIXES, open_table  # noqa: PLC0415
    from overlock.files import Outputs  # noqa: PLC0415

    folder = next((Path(name) for name in options.save if not Path(name).suffix), None)
    outputs = Outputs(sources.inputs, overwrite=options.overwrite, results=folder)
    writers: list[Any] = []
    for name in options.save:
        path = Path(name)
        if path.suffix in TABLE_SUFFIXES:
            writers.append(open_table(outputs.claim(path), predictor.task))
        elif predictor.task == "classify":
            check_picture(path)
            writers.append(_Picture(outputs.claim(path)))
        else:
            folder = outputs.claim_folder(path)
            writers.append(_Results(ResultFolder(folder, predictor.record.classes, outputs)))
    return writers


class _Printed:
    """Results on standard output: a table of the first ones, or JSON of all."""

    def __init__(self, console: Console, task: str, as_json: bool):
        self.console, self.task, self.as_json = console, task, as_json
        self.rows: list[tuple[str, ...]] = []
        self.count = 0

    def add(self, outcome: Result | Failure) -> None:
        if self.as_json:
            from overlock.deploy.tables import describe  # noqa: PLC0415

            text = json.dumps(describe(outcome), indent=2, ensure_ascii=False)
            sys.stdout.write(("[\n" if self.count == 0 else ",\n") + "\n".join(f"  {x}" for x in text.splitlines()))
        elif self.count < SHOWN:
            self.rows.append(_cells(outcome))
        self.count += 1

    def close(self) -> None:
        if self.as_json:
            sys.stdout.write("\n]\n" if self.count else "[]\n")
            return
        width = max((len(row) for row in self.rows), default=1)
        titles = dict(classify=("class",), detect=("objects",), segment=("classes of the pixels",))[self.task]
        table = Table(Column("image", overflow="fold"), *titles, *[""] * (width - 1 - len(titles)))
        for row in self.rows:
            table.add_row(*row)
        self.console.print(table)
        if self.count > SHOWN:
            self.console.print(f"and {self.count - SHOWN} more images; --save FILE.csv keeps all")


def _cells(outcome: Any) -> tuple[str, ...]:
    """A row of the table."""
    name = Path(outcome.source).name + ("" if outcome.frame is None else f" #{outcome.frame}")
    if _is_failure(outcome):
        return name, f"skipped: {outcome.reason}"
    if hasattr(outcome, "probabilities"):
        classes = zip(outcome.labels, outcome.probabilities, strict=True)
        return name, *(f"{label} {100 * share:.1f} %" for label, share in classes)
    if hasattr(outcome, "boxes"):
        counts = Counter(outcome.labels)
        return name, ", ".join(f"{count} {label}" for label, count in counts.items()) or "none"
    return name, ", ".join(f"{label} {100 * share:.0f} %" for label, share in outcome.shares().items())


class _Picture:
    """A picture of the first predictions, written at the end."""

    def __init__(self, path: Path):
        self.path, self.shown, self.more = path, [], 0  # type: ignore[var-annotated]

    def add(self, outcome: Any) -> None:
        if _is_failure(outcome):
            return
        if len(self.shown) < PICTURED:
            self.shown.append(outcome)
        else:
            self.more += 1

    def close(self) -> None:
        from overlock.deploy.picture import save_picture  # noqa: PLC0415

        if self.shown:
            save_picture(self.path, self.shown)
        if self.more:
            Console(stderr=True).print(
                f"{self.path}: shows the first {PICTURED} images, {self.more} more are not on it"
            )


class _Results:
    """A folder of results, which has no place for failures."""

    def __init__(self, folder: Any):
        self.folder, self.close = folder, folder.close

    def add(self, outcome: Any) -> None:
        if not _is_failure(outcome):
            self.folder.add(outcome)


def _is_failure(outcome: Any) -> bool:
    return hasattr(outcome, "reason")


def _with_progress(outcomes: Iterator[Any], count: int | None, task: str) -> Iterator[Any]:
    bar = Console(stderr=True)
    yield from track(outcomes, description=task, total=count, console=bar, transient=True, disable=not bar.is_terminal)


def _introduce(predictor: ImagePredictor[Any]) -> None:
    """Tell on stderr, so that the output stays what it is, which model answers and what it knows."""
    *most, last = predictor.record.classes
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(
        f"using {predictor.record.model}, trained on CIFAR-10, of the package itself (--checkpoint for another); "
        f"it knows {', '.join(most)} and {last}, and gives anything else one of these names"
    )


COMMAND = Command("Classify images, find objects in them, or tell the class of each pixel.", add_options, run)
