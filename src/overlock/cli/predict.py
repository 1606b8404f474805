"""``overlock predict IMAGE ...``."""

from __future__ import annotations

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

from overlock.cli.command import (
    Command,
    add_averaging,
    add_limits,
    add_overwrite,
    add_runtime,
    check_task,
    ended_by_sigterm,
)
from overlock.files import Outputs

if TYPE_CHECKING:
    from overlock.deploy.inputs import Failure
    from overlock.deploy.results import Result
    from overlock.deploy.stream import ImagePredictor
    from overlock.deploy.writers import Writer

SHOWN = 100  # images in the table at the terminal
SOME_FAILED, ALL_FAILED = 1, 2
SETTINGS = dict(
    classify=("top",), detect=("threshold", "max_detections", "nms_iou"), segment=("scales", "flip", "window", "stride")
)
"""Options of each task, which go to its predictor."""
OPTIONS = SETTINGS | dict(detect=(*SETTINGS["detect"], "annotations"))
"""All options of each task."""


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
        help="Folder of a run, file of weights, hf-hub:USER/NAME, or name of a timm model with published weights. "
        "Without it a small model answers that comes with the package and knows the ten classes of CIFAR-10.",
    )
    parser.add_argument(
        "--task",
        type=Literal["classify", "detect", "segment"] | None,
        default=None,
        help="Task of the checkpoint, to make sure of it.",
    )
    parser.add_argument("--model", type=str | None, default=None, help="Model of a checkpoint that does not say.")
    _add_settings(parser)
    parser.add_argument(
        "--batch_size", type=int | None, default=None, help="Images in a batch: 32 to classify, else 1, unless given."
    )
    parser.add_argument("--workers", type=int, default=2, help="Threads that load images.")
    add_runtime(parser)
    parser.add_argument(
        "--max_pixels", type=int | None, default=None, help="Largest image in pixels; 178956970 unless given."
    )
    parser.add_argument("--every", type=int | None, default=None, help="Videos: take every N-th frame.", metavar="N")
    parser.add_argument("--strict", action="store_true", help="Stop at the first image that cannot be read.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument(
        "--save",
        action="append",
        type=str,
        default=[],
        help="May be given several times. FILE.csv, .jsonl or .parquet: a table of all results. FILE.json: of "
        "detectors COCO's results, else what --json prints. FILE.png or .jpg: a picture of up to 400 images. FILE.mp4, "
        "of detectors and segmenters: the drawn frames. FOLDER, likewise: a picture of each image, and the objects in "
        "COCO's form or the label maps.",
    )
    add_overwrite(parser)


def _add_settings(parser: ArgumentParser) -> None:
    """The options of the tasks, none of which is set unless given."""
    parser.add_argument(
        "--top", type=int | None, default=None, help="classify: number of classes to show; 5 unless given."
    )
    parser.add_argument(
        "--threshold", type=float | None, default=None, help="detect: lowest score of an object; 0.5 unless given."
    )
    add_limits(parser)
    parser.add_argument(
        "--annotations",
        type=str | None,
        default=None,
        help="detect: JSON file in COCO's form, whose ids of images and categories --save FILE.json takes.",
    )
    add_averaging(parser)


def run(options: Namespace, console: Console) -> int:
    from overlock.deploy.sources import expand  # noqa: PLC0415
    from overlock.deploy.writers import is_folder  # noqa: PLC0415

    _check(options)
    results = [Path(name) for name in options.save if is_folder(name)]
    outputs = Outputs(overwrite=options.overwrite, results=results)
    every = 1 if options.every is None else options.every
    sources = expand(options.images, outputs=outputs, every=every, results=results)
    if options.every is not None and sources.has_videos is False:
        raise ValueError(f"--every {options.every} is for videos, and none is among the images; leave it out")
    predictor = _make_predictor(options)
    given = check_task(options, predictor.task, OPTIONS)
    outcomes = predictor.stream(
        sources.images, batch_size=options.batch_size, workers=options.workers, keep_images=bool(options.save),
        **{name: value for name, value in given.items() if name in SETTINGS[predictor.task]},
    )  # fmt: skip
    with ended_by_sigterm(), ExitStack() as stack:
        writers = [_print_to(console, predictor.task, options.json)]
        stack.callback(writers[0].close)
        for name in options.save:
            writers.append(_open_writer(name, options, predictor, outputs))
            stack.callback(writers[-1].close)  # what was found is kept, whatever ends the command
        for note in sources.notes:
            _tell(note)
        done, failed = _write_all(_with_progress(outcomes, sources.count, predictor.task), writers, options.strict)
    if failed and not options.strict:
        _tell(f"{failed} of {failed + done} images skipped")
    return 0 if not failed else ALL_FAILED if options.strict or not done else SOME_FAILED


def _write_all(outcomes: Iterator[Result | Failure], writers: Sequence[Writer], strict: bool) -> tuple[int, int]:
    """Give all outcomes to the writers, to the first failure if strict; how many images were done, how many not."""
    done = failed = 0
    for outcome in outcomes:
        problem = getattr(outcome, "sentence", None)
        if problem is None:
            done += 1
        else:
            failed += 1
            _tell(f"skipped {problem}")
        for writer in writers:
            writer.add(outcome)
        if failed and strict:
            break
    return done, failed


def _check(options: Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    if options.max_pixels is not None:
        _raise_limit(options.max_pixels)
    if options.checkpoint is None and options.model is not None:
        raise ValueError(f"--model {options.model} says what a checkpoint holds; give one with --checkpoint")
    if options.checkpoint is None and options.task not in (None, "classify"):
        raise ValueError(f"--task {options.task} needs a trained network; give one with --checkpoint")
    if options.annotations is not None and not any(name.lower().endswith(".json") for name in options.save):
        raise ValueError("--annotations says the ids that --save FILE.json takes; give that too, or leave it out")


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
    from overlock.deploy.models import load_network  # noqa: PLC0415

    network, record = load_network(options.checkpoint, model=options.model)
    if options.task not in (None, record.task):
        raise ValueError(f"{options.checkpoint}: a {record.name} is for --task {record.task}, not {options.task}")
    kinds: dict[str, Any] = dict(classify=Predictor, detect=Detector, segment=Segmenter)
    return kinds[record.task](network, record, **runtime)


def _open_writer(name: str, options: Namespace, predictor: ImagePredictor[Any], outputs: Outputs) -> Writer:
    """What a --save asks for."""
    from overlock.deploy.coco_results import ImageIds  # noqa: PLC0415
    from overlock.deploy.writers import Saving, open_writer  # noqa: PLC0415

    ids = None if options.annotations is None else ImageIds(Path(options.annotations))
    saving = Saving(
        task=predictor.task, classes=predictor.record.classes, outputs=outputs, every=options.every or 1, image_ids=ids
    )
    return open_writer(name, saving)


def _print_to(console: Console, task: str, as_json: bool) -> Writer:
    """What prints the results."""
    from overlock.deploy.tables import JsonFile  # noqa: PLC0415

    return JsonFile(sys.stdout) if as_json else _PrintedTable(console, task)


class _PrintedTable:
    """A table of the first results."""

    def __init__(self, console: Console, task: str):
        self.console, self.task = console, task
        self.rows: list[tuple[str, ...]] = []
        self.count = 0

    def add(self, outcome: Result | Failure) -> None:
        if self.count < SHOWN:
            self.rows.append(_cells(outcome))
        self.count += 1

    def close(self) -> None:
        if not self.rows:
            return
        width = max(len(row) for row in self.rows)
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
    if hasattr(outcome, "reason"):
        return name, f"skipped: {outcome.reason}"
    if hasattr(outcome, "probabilities"):
        classes = zip(outcome.labels, outcome.probabilities, strict=True)
        return name, *(f"{label} {100 * share:.1f} %" for label, share in classes)
    if hasattr(outcome, "boxes"):
        counts = Counter(outcome.labels)
        return name, ", ".join(f"{count} {label}" for label, count in counts.items()) or "none"
    return name, ", ".join(f"{label} {100 * share:.0f} %" for label, share in outcome.shares().items())


def _tell(sentence: str) -> None:
    """On stderr, so that the output stays what it is."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(sentence)


def _with_progress(outcomes: Iterator[Any], count: int | None, task: str) -> Iterator[Any]:
    bar = Console(stderr=True)
    yield from track(outcomes, description=task, total=count, console=bar, transient=True, disable=not bar.is_terminal)


def _introduce(predictor: ImagePredictor[Any]) -> None:
    """Tell which model answers and what it knows."""
    *most, last = predictor.record.classes
    _tell(
        f"using {predictor.record.model}, trained on CIFAR-10, of the package itself (--checkpoint for another); "
        f"it knows {', '.join(most)} and {last}, and gives anything else one of these names"
    )


COMMAND = Command("Classify images, find objects in them, or tell the class of each pixel.", add_options, run)
