"""``overlock evaluate MODEL ... --data DATA``."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Column, Table

from overlock.cli.command import (
    Command,
    add_averaging,
    add_limits,
    add_overwrite,
    add_runtime,
    check_task,
    given_of,
)
from overlock.files import Outputs
from overlock.label_files import LabelFiles
from overlock.object_files import Format, ObjectFiles

if TYPE_CHECKING:
    from overlock.data import ImageData
    from overlock.deploy.evaluate_classification import Classification
    from overlock.deploy.evaluation import Evaluation
    from overlock.deploy.models import Source

SOME_FAILED = 1  # the exit code where images could not be read
TESTING = dict(
    classify=("image_size", "crop_pct", "batch_size"), detect=("max_detections", "nms_iou", "batch_size"),
    segment=("scales", "flip", "window", "stride"),
)  # fmt: skip
"""Options of each task, which go to its evaluation."""
MAPS = ("classes", "labels", "colours", "reduce_zero_label", "ignore_index")
"""Those of how label maps are read."""
OPTIONS = dict(
    classify=("classes", *TESTING["classify"]), detect=("format", "annotations", "images", *TESTING["detect"]),
    segment=(*MAPS, *TESTING["segment"]),
)  # fmt: skip
"""All options of each task."""
REPORTS = dict(
    classify=("classes.csv", "confusion.png"), detect=("classes.csv", "results.json"), segment=("classes.csv",)
)
"""What --save writes of each model."""


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        type=str,
        metavar="MODEL",
        help="Folders of runs, files of weights, hf-hub:USER/NAME, or names of timm models with published weights.",
    )
    parser.add_argument("--data", type=str, required=True, help="Labelled images, in any form that training takes.")
    parser.add_argument(
        "--val_split", type=str | None, default=None, help="Name of the part to test on; the usual ones are tried."
    )
    parser.add_argument("--classes", type=str | None, default=None, help="classify, segment: file of the class names.")
    parser.add_argument(
        "--held_out", action="store_true", help="Of a folder without a test part, take what training holds out."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of that split, as in training.")
    parser.add_argument("--model", type=str | None, default=None, help="Model of a file that does not say.")
    parser.add_argument(
        "--image_size", type=int | None, default=None, help="classify: side in pixels; the model's own unless given."
    )
    parser.add_argument(
        "--crop_pct",
        type=float | None,
        default=None,
        help="classify: share of the image in the centre crop; the model's own unless given.",
    )
    parser.add_argument(
        "--batch_size",
        type=int | None,
        default=None,
        help="Images in a batch; classify: 64, detect: 1, unless given.",
    )
    parser.add_argument("--workers", type=int, default=2, help="Processes that load images.")
    add_runtime(parser)
    _add_detection(parser)
    _add_segmentation(parser)
    parser.add_argument("--strict", action="store_true", help="Stop at the first image that cannot be read.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument(
        "--save",
        type=str | None,
        default=None,
        help="Folder for a table of the classes. classify: and the confusion matrix as a picture. detect: and COCO's "
        "results, with the ids of the data.",
    )
    add_overwrite(parser)


def _add_detection(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--format", type=Format | None, default=None, help="detect: form of the annotations; recognised unless given."
    )
    parser.add_argument(
        "--annotations", type=str | None, default=None, help="detect: file of the annotations, or folder of such files."
    )
    parser.add_argument("--images", type=str | None, default=None, help="detect: folder of their images.")
    add_limits(parser)


def _add_segmentation(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--labels",
        type=str | None,
        default=None,
        help="segment: pixel values of the classes in order, such as 0,255; as in the model's run unless given.",
    )
    parser.add_argument(
        "--colours",
        type=str | None,
        default=None,
        help="segment: voc, cityscapes, or a file of lines 'name r g b'; as in the model's run unless given.",
    )
    parser.add_argument(
        "--reduce_zero_label", action="store_true", help="segment: labels begin at 1, 0 is ignored, as in ADE20K."
    )
    parser.add_argument(
        "--ignore_index", type=int | None, default=None, help="segment: value of ignored pixels; 255 unless given."
    )
    add_averaging(parser)


def run(options: Namespace, console: Console) -> int:
    from overlock.deploy.models import open_exported, task_of  # noqa: PLC0415

    for name, least in (("batch_size", 1), ("workers", 0), ("image_size", 1)):
        value = options[name]
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if options.crop_pct is not None and not 0 < options.crop_pct <= 1:
        raise ValueError(f"--crop_pct must be above 0 and up to 1, got {options.crop_pct}")
    sources = [open_exported(source) for source in options.models]
    tasks = {task_of(source, model=options.model) for source in sources}
    if len(tasks) > 1:
        raise ValueError(
            "models of different tasks have no table in common; evaluate classifiers, detectors and "
            "segmenters each by themselves"
        )
    (task,) = tasks
    given = check_task(options, task, OPTIONS)
    given = {name: value for name, value in given.items() if name in TESTING[task]}
    if task == "classify":
        unreadable = _evaluate_classifiers(options, sources, given, console)
    else:
        unreadable = _evaluate_others(options, sources, given, console, task)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    for problem in unreadable:
        errors.print(f"skipped {problem}")
    return SOME_FAILED if unreadable else 0


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


def _evaluate_classifiers(
    options: Namespace, sources: Sequence[Source], given: dict[str, Any], console: Console
) -> tuple[str, ...]:
    """Returns what could not be read."""
    from overlock.data import load_test_data  # noqa: PLC0415
    from overlock.deploy.evaluate_classification import (  # noqa: PLC0415
        draw_confusion,
        evaluate_classifier,
        write_per_class,
    )

    data = load_test_data(
        options.data, held_out=options.held_out, seed=options.seed, val_split=options.val_split, classes=options.classes
    )
    reports = _claim_reports(options, "classify")
    results = []
    for i, source in enumerate(sources):
        runtime = {name: options[name] for name in ("model", "workers", "device", "precision", "strict")}
        result = evaluate_classifier(source, data, **given, **runtime)
        results.append(result)
        if reports:
            write_per_class(result, reports[i]["classes.csv"])
            draw_confusion(result, reports[i]["confusion.png"])
    if options.json:
        fields = ("name", "params", "images", "top1", "top5", "speed", "speed_with_loading", "unreadable")
        _print_json([{name: getattr(result, name) for name in fields} for result in results])
    else:
        _print_classifiers(results, data, console)
    return results[0].unreadable


def _print_classifiers(results: Sequence[Classification], data: ImageData, console: Console) -> None:
    table = Table(Column("model", overflow="fold"), title=f"{len(data.test)} images of {len(data.classes)} classes")
    for title in ("parameters, M", "top-1, %", "top-5, %", "images/s", "with loading"):
        table.add_column(title, justify="right")
    for result in results:
        table.add_row(
            result.name, _millions(result.params), f"{100 * result.top1:.2f}", f"{100 * result.top5:.2f}",
            f"{result.speed:.0f}", f"{result.speed_with_loading:.0f}",
        )  # fmt: skip
    console.print(table)
    for note in data.notes:
        console.print(note)


def _evaluate_others(
    options: Namespace, sources: Sequence[Source], given: dict[str, Any], console: Console, task: str
) -> tuple[str, ...]:
    """Detectors or segmenters; returns what could not be read."""
    files: ObjectFiles | LabelFiles
    notes: tuple[str, ...]
    from overlock.deploy.evaluate import evaluate_by_task  # noqa: PLC0415
    from overlock.deploy.evaluate_detection import write_coco_results  # noqa: PLC0415
    from overlock.deploy.evaluation import write_classes  # noqa: PLC0415
    from overlock.deploy.models import load_network  # noqa: PLC0415

    if task == "segment":
        files, notes = _label_files(options)
    else:
        files, notes = _object_files(options), ()
        given["keep_found"] = options.save is not None
    reports = _claim_reports(options, task)
    runtime = {name: options[name] for name in ("held_out", "seed", "workers", "device", "precision", "strict")}
    results: list[Evaluation] = []
    for name, source in zip(options.models, sources, strict=True):
        network, record = load_network(source, model=options.model)
        result = evaluate_by_task(
            network, record, files, name=name, show_progress=console.is_terminal, **given, **runtime
        )
        results.append(dataclasses.replace(result, notes=(*notes, *result.notes)))
    for report, result in zip(reports, results, strict=False):
        write_classes(result, report["classes.csv"])
        if task == "detect":
            write_coco_results(result, report["results.json"])
    if options.json:
        _print_json([_as_json(result) for result in results])
    else:
        _print_measures(results, "IoU" if task == "segment" else "box AP", console)
    return results[0].unreadable


def _object_files(options: Namespace) -> ObjectFiles:
    """Where the images to test a detector on, and their annotations, are."""
    return ObjectFiles(
        data=options.data, format=options.format, split=options.val_split, annotations=options.annotations,
        images=options.images,
    )  # fmt: skip


def _label_files(options: Namespace) -> tuple[LabelFiles, tuple[str, ...]]:
    """Where the images to test a segmenter on, and their label maps, are; how these are read, as the options or else
    the run of the model say; and a note of what the run says.

    Raises:
        ValueError: where it depends on the run, and those of several models differ.
    """
    given = given_of(options, MAPS)
    place = dict(data=options.data, val_split=options.val_split)
    if any(name in given for name in ("labels", "colours", "reduce_zero_label")):
        return LabelFiles(**place, **given), ()
    usual = LabelFiles(**place)
    runs = {source: files for source in options.models if (files := _label_files_of_run(source)) is not None}
    found = {source: {name: getattr(files, name) for name in MAPS} for source, files in runs.items()}
    if len({tuple(values.items()) for values in found.values()}) > 1:
        raise ValueError(
            f"{' and '.join(found)}: these runs read label maps in different ways; say how with --labels, --colours or "
            "--reduce_zero_label"
        )
    own = next(iter(found.values()), {})
    own = {name: value for name, value in own.items() if value != getattr(usual, name) and name not in given}
    if own.get("classes") and not Path(own["classes"]).is_file():
        del own["classes"]  # the model knows the names
    told = ", ".join(f"{name} {value}" for name, value in own.items())
    notes = (f"label maps are read as in {next(iter(found))}: {told}",) if own else ()
    return LabelFiles(**place, **given, **own), notes


def _label_files_of_run(source: str) -> LabelFiles | None:
    """How the run of a model read its label maps; None for a model that is in no run's folder."""
    from overlock.training import CONFIGS, SegmentConfig  # noqa: PLC0415

    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = CONFIGS[settings["task"]].from_dict(settings)
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: these are no settings of a run ({reason}); say how label maps are read: --labels, --colours or "
            "--reduce_zero_label"
        ) from None
    return config.label_files if isinstance(config, SegmentConfig) else None


def _print_json(rows: Sequence[dict[str, Any]]) -> None:
    sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _as_json(result: Evaluation) -> dict[str, Any]:
    """All but the objects; JSON knows no NaN."""
    row = dataclasses.asdict(dataclasses.replace(result, found=()))
    del row["found"]
    for part in ("measures", "classes"):
        row[part] = {name: None if math.isnan(share) else share for name, share in row[part].items()}
    return row


def _print_measures(results: Sequence[Evaluation], measure: str, console: Console) -> None:
    """A table with a column for each model; ``measure`` is that of the classes."""

    def percent(share: float) -> str:
        return "none" if math.isnan(share) else f"{100 * share:.2f}"

    columns = (Column(result.name, justify="right", overflow="fold") for result in results)
    table = Table("metric", *columns, title=f"{results[0].images} images")
    table.add_row("parameters, M", *(_millions(result.params) for result in results))
    for name in results[0].measures:
        table.add_row(f"{name}, %", *(percent(result.measures[name]) for result in results))
    for name in results[0].classes:
        shares = (percent(result.classes.get(name, math.nan)) for result in results)
        table.add_row(f"{measure} of {name}, %", *shares)
    table.add_row("images/s, with loading", *(f"{result.speed_with_loading:.1f}" for result in results))
    console.print(table)
    for note in results[0].notes:
        console.print(note)


def _millions(params: int) -> str:
    """Of parameters, which exported files do not tell."""
    return f"{params / 1e6:.2f}" if params else "-"


COMMAND = Command("Accuracy and speed of classifiers, ours and timm's, of detectors and segmenters.", add_options, run)
