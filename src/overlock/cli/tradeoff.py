"""``overlock tradeoff [MODEL...]``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import track

from overlock.cli.command import Command
from overlock.cli.subjects import as_csv, print_rows
from overlock.files import Outputs, write_atomically

if TYPE_CHECKING:
    from overlock.analysis.runtime_study import Subject, Trial
    from overlock.analysis.tradeoff import Axis, Point

MODELS = (
    "overlock_xt", "overlock_t", "overlock_s", "overlock_b", "convnext_nano", "convnext_tiny", "convnext_small",
    "convnext_base", "swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "pvt_v2_b2",
    "focalnet_tiny_lrf", "inception_next_tiny", "mambaout_tiny", "caformer_s18", "caformer_s36", "efficientvit_b2",
    "efficientvit_b3", "efficientvit_l1", "efficientvit_l2", "repvit_m2_3",
)  # fmt: skip
"""Measured unless others are named: networks of the paper that timm has too, and those nearest to the fronts."""
CostName = Literal["macs", "params", "latency"]
COSTS: tuple[CostName, ...] = ("macs", "params", "latency")
RuntimeName = Literal["eager", "fused", "compile", "onnxruntime", "openvino"]
ALL: tuple[RuntimeName, ...] = ("eager", "fused", "compile", "onnxruntime", "openvino")
TABLE, PICTURE = "tradeoff.csv", "tradeoff.png"
CLASSIFY = "classify"
SHOWN = {
    "method": "method", "top-1": "score", "G": "macs", "M": "params", "batch": "batch", "runtime": "runtime",
    "ms": "milliseconds", "spread, %": "spread", "images/s": "images_per_second",
}  # fmt: skip
"""Columns of the table for people, and their names in the CSV."""


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "models", nargs="*", type=str, metavar="MODEL", default=list(MODELS),
        help="Models of timm's or ours to measure, with random weights, or runs' folders and files of weights; 21 of "
        "the paper's networks and others unless given.",
    )  # fmt: skip
    parser.add_argument(
        "--published", action="store_true", help="Measure nothing: published accuracy, multiply-adds and parameters."
    )
    parser.add_argument(
        "--data", type=str | None, default=None,
        help="Labelled images that the accuracy of trained networks is measured on, in place of published ones.",
    )  # fmt: skip
    parser.add_argument(
        "--task", type=Literal["classify", "mask_rcnn", "cascade_mask_rcnn", "upernet"], default=CLASSIFY,
        help="With --published: the tables of another task.",
    )  # fmt: skip
    parser.add_argument(
        "--runtimes", type=RuntimeName, nargs="+", default=list(ALL),
        help="Of which each model takes the fastest; what is not installed is left out. fused is overlock.fuse.",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1], help="Images of a call; several are measured each."
    )
    parser.add_argument(
        "--image_size", type=int | None, default=None,
        help="Side in pixels; that of a model's training or published accuracy unless given, mostly 224.",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="Turns of each model in the last, interleaved run.")
    parser.add_argument(
        "--costs", type=CostName, nargs="+", default=list(COSTS), help="Panels of the picture: all, or those named."
    )
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, ...; a GPU if there is one.")
    parser.add_argument(
        "--output", type=str, default="runs/tradeoff",
        help="Folder for runtimes.csv, latency.csv, tradeoff.csv and tradeoff.png. The same command again measures "
        "what is not there yet.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")


def run(options: Namespace, console: Console) -> None:
    from overlock.analysis.published import SCORES  # noqa: PLC0415
    from overlock.analysis.tradeoff import make_axes, make_points, make_rows  # noqa: PLC0415
    from overlock.analysis.tradeoff_picture import draw_tradeoff  # noqa: PLC0415

    if options.task != CLASSIFY and not options.published:
        raise ValueError(f"--task {options.task} has no networks to measure; add --published")
    if options.published and options.data is not None:
        raise ValueError("--published measures nothing; leave out it or --data")
    if options.published and set(options.costs) == {"latency"}:
        raise ValueError("--published measures no latency; leave it out, or name other --costs")
    for name in ("batch", "rounds", "image_size"):
        values = options[name] if isinstance(options[name], list) else [options[name] or 1]
        if min(values) < 1:
            raise ValueError(f"--{name} must be at least 1, got {min(values)}")
    output = Outputs(overwrite=True).check_folder(options.output)
    told = Console(stderr=True, soft_wrap=True, highlight=False, markup=False) if options.json else console
    if not options.published:
        _check_models(options)
    accuracies = None if options.data is None else _evaluate(options)
    measured: dict[Subject, Trial] = {} if options.published else _measure(options, output, told)
    points = make_points(options.task, measured, accuracies)
    axes = make_axes(points)
    rows = make_rows(points, axes)
    score = SCORES[options.task][1] if accuracies is None else f"top-1 on {Path(options.data).name}, %"
    title = "published figures, and latency" if accuracies is None else "latency"
    title = f"{title} on {next(iter(measured.values())).machine}" if measured else "published figures"
    write_atomically(output / TABLE, as_csv(rows))
    drawn = [axis for axis in axes if axis.name.partition("_")[0] in options.costs]
    write_atomically(output / PICTURE, draw_tradeoff(drawn, score=score, title=title))
    if options.json:
        fronts = {axis.name: {"all": _names(axis.front()), "paper": _names(axis.paper_front())} for axis in axes}
        console.print_json(json.dumps(dict(rows=rows, fronts=fronts)))
        return
    if measured:
        several = len({subject.batch for subject in measured}) > 1
        shown = {title: name for title, name in SHOWN.items() if several or name not in ("batch", "images_per_second")}
        print_rows(
            console,
            [
                {title: "" if row[name] is None else row[name] for title, name in shown.items()}
                for row in rows
                if row["batch"]
            ],
            title="each model in its fastest runtime",
        )
    _tell_fronts(axes, console)
    console.print(f"in {output}: {', '.join(sorted(path.name for path in output.iterdir() if path.is_file()))}")


def _names(points: Sequence[Point]) -> list[str]:
    return [point.method for point in points]


def _tell_fronts(axes: Sequence[Axis], console: Console) -> None:
    for axis in axes:
        for front, of in ((axis.paper_front(), "the paper's methods"), (axis.front(), "all")):
            if not front:
                continue
            named = ", ".join(f"{point.method} ({axis.cost(point):.4g}: {point.score:.4g})" for point in front)
            console.print(f"Pareto front of {of} by {axis.title}: {named}")


def _check_models(options: Namespace) -> None:
    from overlock.checkpoints.record import check_model_name  # noqa: PLC0415
    from overlock.deploy.models import is_file  # noqa: PLC0415

    for model in options.models:
        if is_file(model):
            if not Path(model).exists():
                raise ValueError(f"{model}: no such file or folder")
        elif options.data is not None:
            raise ValueError(f"{model}: no such file or folder; --data takes trained networks alone")
        else:
            check_model_name(model)


def _evaluate(options: Namespace) -> dict[str, float]:
    """Top-1 of each model, in percent."""
    from overlock.data import load_test_data  # noqa: PLC0415
    from overlock.deploy.evaluate_classification import evaluate_classifier  # noqa: PLC0415

    data, bar = load_test_data(options.data), Console(stderr=True)
    models = track(options.models, "evaluate", console=bar, transient=True, disable=not bar.is_terminal)
    return {model: 100 * evaluate_classifier(model, data, image_size=options.image_size).top1 for model in models}


def _measure(options: Namespace, output: Path, told: Console) -> dict[Subject, Trial]:
    from overlock.analysis.runtime_study import Study, measure_latency, try_runtimes  # noqa: PLC0415
    from overlock.analysis.runtimes import RUNTIMES  # noqa: PLC0415
    from overlock.deploy.runtime import choose_device  # noqa: PLC0415

    device = choose_device(options.device)
    study = Study(
        models=tuple(dict.fromkeys(options.models)), batches=tuple(dict.fromkeys(options.batch)),
        image_size=options.image_size, runtimes=tuple(options.runtimes), device=device, rounds=options.rounds,
        folder=output,
    )  # fmt: skip
    for name in study.runtimes:
        why = RUNTIMES[name].why_not("overlock_", device)
        if why:
            told.print(f"{name} is left out: {why}")
    with _bar(len(study.subjects())) as tick:
        fastest = try_runtimes(study, told.print, tick)
    with _bar(len(study.subjects()) * (1 + study.rounds)) as tick:
        return measure_latency(study, fastest, tick)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str], None]]:
    """A bar of progress at a terminal, moved on by a call with the name of the step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda text: progress.update(task, description=text, advance=1)


COMMAND = Command(
    "Draw accuracy against multiply-adds, parameters and measured latency, with the Pareto fronts.", add_options, run
)
