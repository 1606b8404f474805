"""``overlock evaluate MODEL ... --data DATA``."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Column, Table

from overlock.cli.command import Command, add_overwrite, add_runtime
from overlock.files import Outputs
from overlock.label_files import LabelFiles
from overlock.object_files import Format, ObjectFiles

SOME_FAILED = 1  # the exit code where images could not be read


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        type=str,
        metavar="MODEL",
        help="Folders of runs, files of weights, or names of timm's models.",
    )
    parser.add_argument("--data", type=str, required=True, help="Labelled images, in any form that training takes.")
    parser.add_argument(
        "--val_split", type=str | None, default=None, help="Name of the part to test on; the usual names are tried."
    )
    parser.add_argument(
        "--classes", type=str | None, default=None, help="classify, segment: file of the classes' names."
    )
    parser.add_argument(
        "--held_out", action="store_true", help="Of a folder without a test part, what training holds out."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of that split, as in training.")
    parser.add_argument(
        "--format", type=Format | None, default=None, help="detect: form of the annotations; told by what lies there."
    )
    parser.add_argument(
        "--annotations", type=str | None, default=None, help="detect: file of the annotations, or folder of such files."
    )
    parser.add_argument("--images", type=str | None, default=None, help="detect: folder of their images.")
    parser.add_argument("--model", type=str | None, default=None, help="Model of a file that does not say.")
    parser.add_argument(
        "--image_size", type=int | None, default=None, help="classify: side in pixels; the model's own."
    )
    parser.add_argument("--crop_pct", type=float | None, default=None, help="classify: share kept by the crop.")
    parser.add_argument(
        "--batch_size", type=int | None, default=None, help="Images a pass: 64 to classify, 1 to detect unless given."
    )
    parser.add_argument("--workers", type=int, default=2, help="Processes that load images.")
    add_runtime(parser)
    parser.add_argument(
        "--labels", type=str | None, default=None, help="segment: pixel values of the classes in order, e.g. 0,255."
    )
    parser.add_argument(
        "--colours", type=str | None, default=None, help="segment: voc, cityscapes, or a file of lines 'name r g b'."
    )
    parser.add_argument("--shift", action="store_true", help="segment: labels begin at 1, 0 is ignored, as in ADE20K.")
    parser.add_argument("--ignore_index", type=int, default=255, help="segment: value of pixels that do not count.")
    parser.add_argument("--scales", type=list[float], default=[1.0], help="segment: e.g. [0.5,1,1.5], their mean.")
    parser.add_argument("--flip", action="store_true", help="segment: take the mean with the mirrored image.")
    parser.add_argument("--window", type=int | None, default=None, help="segment: slide a window of this side.")
    parser.add_argument("--stride", type=int | None, default=None, help="segment: its step, by default two thirds.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument(
        "--max_detections", type=int | None, default=None, help="detect: most objects of an image; 100 unless given."
    )
    parser.add_argument(
        "--nms_iou", type=float | None, default=None,
        help="detect: overlap from which on one of two boxes of a class is dropped; 0.5 unless given.",
    )  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="End at the first image that cannot be read.")
    parser.add_argument(
        "--save", type=str | None, default=None,
        help="Folder for a table of the classes; classify: and a picture of the confusions; detect: and the objects "
        "as COCO's results, with the ids of the data.",
    )  # fmt: skip
    add_overwrite(parser)


def run(options: Namespace, console: Console) -> int:
    from overlock.checkpoint import load_record  # noqa: PLC0415

    for name, least in (("batch_size", 1), ("workers", 0), ("image_size", 1)):
        value = options[name]
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    tasks = {
        load_record(source, model=options.model).task if Path(source).exists() else "classify"
        for source in options.models
    }
    if tasks == {"classify"}:
        unreadable = _evaluate_classifiers(options, console)
    elif len(tasks) == 1:
        unreadable = _evaluate_dense(options, console, *tasks)
    else:
        raise ValueError(
            "models of different tasks have no table in common; evaluate classifiers, detectors and "
            "segmenters each by themselves"
        )
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    for problem in unreadable:
        errors.print(f"skipped {problem}")
    return SOME_FAILED if unreadable else 0


REPORTS = dict(
    classify=("classes.csv", "confusion.png"), detect=("classes.csv", "results.json"), segment=("classes.csv",)
)
"""What --save writes of each model."""


def _claim_reports(options: Namespace, task: str) -> list[dict[str, Path]]:
    """The files for the results of each model, by their endings; none where nothing is saved."""
    if options.save is None:
        return []
    read = [options.data, options.annotations, options.images, options.classes, options.colours]
    outputs = Outputs([*options.models, *filter(None, read)], overwrite=options.overwrite)
    stems = ("".join(c if c.isalnum() or c in "._-" else "_" for c in source.strip("/")) for source in options.models)
    return [
        {ending: outputs.claim(Path(options.save) / f"{stem}_{ending}") for ending in REPORTS[task]} for stem in stems
    ]


def _evaluate_classifiers(options: Namespace, console: Console) -> tuple[str, ...]:
    """Returns what could not be read."""
    from overlock.data import load_test_data  # noqa: PLC0415
    from overlock.deploy.evaluate import draw_confusion, evaluate, write_per_class  # noqa: PLC0415

    data = load_test_data(
        options.data, held_out=options.held_out, seed=options.seed, val_split=options.val_split, classes=options.classes
    )
    settings = ("model", "image_size", "crop_pct", "workers", "device", "precision", "strict")
    reports = _claim_reports(options, "classify")
    results = []
    for source in options.models:
        result = evaluate(
            source,
            data,
            batch_size=64 if options.batch_size is None else options.batch_size,
            **{name: options[name] for name in settings},
        )
        results.append(result)
        if reports:
            report = reports[len(results) - 1]
            write_per_class(result, report["classes.csv"])
            draw_confusion(result, report["confusion.png"])
    if options.json:
        fields = ("name", "params", "images", "top1", "top5", "speed", "speed_with_loading", "unreadable")
        rows = [{name: getattr(result, name) for name in fields} for result in results]
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        return results[0].unreadable
    table = Table(Column("model", overflow="fold"), title=f"{len(data.test)} images of {len(data.classes)} classes")
    for title in ("parameters, M", "top-1, %", "top-5, %", "images/s", "with loading"):
        table.add_column(title, justify="right")
    for result in results:
        table.add_row(
            result.name, f"{result.params / 1e6:.2f}", f"{100 * result.top1:.2f}", f"{100 * result.top5:.2f}",
            f"{result.speed:.0f}", f"{result.speed_with_loading:.0f}",
        )  # fmt: skip
    console.print(table)
    for note in data.notes:
        console.print(note)
    return results[0].unreadable


def _evaluate_dense(options: Namespace, console: Console, task: str) -> tuple[str, ...]:
    """Returns what could not be read."""
    from overlock.checkpoint import load_model  # noqa: PLC0415
    from overlock.deploy.evaluate_dense import evaluate_dense, write_classes, write_coco_results  # noqa: PLC0415

    testing: dict[str, Any] = {}
    files: ObjectFiles | LabelFiles
    if task == "segment":
        testing = {name: options[name] for name in ("scales", "flip", "window", "stride")}
        files = LabelFiles(
            data=options.data, val_split=options.val_split, classes=options.classes, colours=options.colours,
            labels=options.labels, shift=options.shift, ignore_index=options.ignore_index,
        )  # fmt: skip
    else:
        if options.classes:
            raise ValueError("--classes: a detector's classes have the names of the data's categories; leave it out")
        testing = {name: options[name] for name in ("max_detections", "nms_iou")}
        files = ObjectFiles(
            data=options.data, format=options.format, split=options.val_split, annotations=options.annotations,
            images=options.images,
        )  # fmt: skip
    reports = _claim_reports(options, task)
    results = [
        evaluate_dense(
            *load_model(source, model=options.model), files, name=source, held_out=options.held_out, seed=options.seed,
            batch_size=1 if options.batch_size is None else options.batch_size, workers=options.workers,
            device=options.device, precision=options.precision, show_progress=console.is_terminal,
            strict=options.strict, keep_found=bool(options.save), **testing,
        )
        for source in options.models
    ]  # fmt: skip
    for report, result in zip(reports, results, strict=False):
        write_classes(result, report["classes.csv"])
        if task == "detect":
            write_coco_results(result, report["results.json"])
    if options.json:
        rows = [dataclasses.asdict(dataclasses.replace(result, found=())) for result in results]
        for row in rows:
            del row["found"]
            for part in ("measures", "classes"):  # JSON knows no NaN
                row[part] = {name: None if math.isnan(share) else share for name, share in row[part].items()}
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return results[0].unreadable
    columns = (Column(result.name, justify="right", overflow="fold") for result in results)
    table = Table("measure", *columns, title=f"{results[0].images} images")
    table.add_row("parameters, M", *(f"{result.params / 1e6:.2f}" for result in results))
    for name in results[0].measures:
        shares = (result.measures[name] for result in results)
        table.add_row(f"{name}, %", *(f"{100 * share:.2f}" if share >= 0 else "none" for share in shares))
    measure = "IoU" if task == "segment" else "box AP"
    for name in results[0].classes:
        shares = (result.classes.get(name, math.nan) for result in results)
        table.add_row(
            f"{measure} of {name}, %",
            *("none" if math.isnan(share) else f"{100 * share:.2f}" for share in shares),
        )
    table.add_row("images/s, with loading", *(f"{result.speed_with_loading:.1f}" for result in results))
    console.print(table)
    for note in results[0].notes:
        console.print(note)
    return results[0].unreadable


COMMAND = Command("Accuracy and speed of classifiers, ours and timm's, of detectors and segmenters.", add_options, run)
