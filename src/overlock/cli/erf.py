"""``overlock erf MODEL... --images FOLDER``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command, add_overwrite, add_runtime
from overlock.cli.subjects import (
    Subject,
    add_save,
    as_csv,
    claim_results,
    find_files,
    make_subject,
    name_of,
    print_rows,
    read_images,
)
from overlock.files import Outputs, write_atomically

if TYPE_CHECKING:
    from overlock.analysis.field_picture import Labelled


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        type=str,
        metavar="MODEL",
        help="Runs' folders, files of weights, hf-hub:USER/NAME, or models of timm's.",
    )
    parser.add_argument("--images", type=str, nargs="+", required=True, help="Images, or folders of such.")
    parser.add_argument(
        "--count", type=int, default=50, help="Most images to take, at even steps through those that there are."
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[224], help="Sides in pixels that the images are brought to."
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[3, 4], help="Stages of the features, 1 to 4.")
    parser.add_argument(
        "--weights",
        type=Literal["trained", "untrained", "both"],
        default="trained",
        help="The networks with their weights, with those they start from, or both beside each other.",
    )
    parser.add_argument(
        "--gradient",
        type=Literal["relu", "abs"],
        default="relu",
        help="relu: positive features and gradients, as usual; abs: all features, and the size of the gradients.",
    )
    add_runtime(parser)
    add_save(parser, "the squares that hold 20, 30, 50 and 99 %", "the fields and their curves")
    add_overwrite(parser)


def run(options: Namespace, console: Console) -> None:
    from overlock.analysis.field_picture import Labelled, draw_fields  # noqa: PLC0415
    from overlock.deploy.picture import encode  # noqa: PLC0415

    for name in ("sizes", "count"):
        values = options[name] if isinstance(options[name], list) else [options[name]]
        if min(values) < 1:
            raise ValueError(f"--{name} must be at least 1, got {min(values)}")
    outputs = Outputs(options.models, overwrite=options.overwrite)
    files = find_files(options.images, outputs)
    step = max(1, len(files) // options.count)
    files = files[::step][: options.count]
    targets = claim_results(options.save, outputs)
    found: list[Labelled] = []
    for model in options.models:
        for subject in _subjects(model, options):
            for size in options.sizes:
                found += [Labelled(subject.name, size, field) for field in _measure(subject, files, size, options)]
    rows = [_row(one, len(files)) for one in found]
    for path, is_picture in targets.items():
        write_atomically(path, encode(draw_fields(found), path) if is_picture else as_csv(rows))
    if options.json:
        curves = [dict(row, curve=one.field.curves.mean(dim=0).tolist()) for row, one in zip(rows, found, strict=True)]
        console.print_json(json.dumps(curves))
        return
    print_rows(
        console,
        [_for_people(row) for row in rows],
        title="side in pixels of the centred square that holds a share of the contributions",
    )


def _subjects(model: str, options: Namespace) -> list[Subject]:
    """The networks of a word: trained, untrained, or both."""
    import torch  # noqa: PLC0415

    from overlock.deploy.models import load_network, load_untrained  # noqa: PLC0415

    subjects = []
    name = name_of(model)
    if options.weights != "untrained":
        subjects.append(make_subject(name, *load_network(model), options))
    if options.weights != "trained":
        torch.manual_seed(0)
        subjects.append(make_subject(f"{name}, untrained", *load_untrained(model), options))
    return subjects


def _measure(subject: Subject, files: Sequence[Path], size: int, options: Namespace) -> list[Any]:
    """The receptive fields of a network at a size, of whole images squashed to squares."""
    from overlock.analysis.backbones import Preparation, make_stages  # noqa: PLC0415
    from overlock.analysis.receptive_field import measure_fields  # noqa: PLC0415

    prepare = Preparation(subject.network, subject.record, size, keep_aspect=False)
    images = read_images(files, f"{subject.name}, {size}")
    batches = (prepare(image).to(subject.device) for _, image in images)
    stages = make_stages(subject.network, subject.name)
    try:
        with subject.cast:
            return measure_fields(stages, batches, wanted=options.stages, gradient=options.gradient)
    except AssertionError as error:  # of timm's networks that know one size alone
        raise ValueError(f"{subject.name}: does not take images of {size} x {size} ({error})") from None


def _row(one: Labelled, images: int) -> dict[str, Any]:
    from overlock.analysis.receptive_field import SHARES  # noqa: PLC0415

    row: dict[str, Any] = dict(network=one.name, stage=one.field.stage, size=one.size, images=images)
    for share in SHARES:
        side, deviation = one.field.side(share)
        row |= {f"{100 * share:.0f} %": side, f"± {100 * share:.0f} %": deviation}
    row |= dict(centre_row=one.field.centre[0], centre_column=one.field.centre[1])
    return row


def _for_people(row: dict[str, Any]) -> dict[str, Any]:
    """A side and its deviation in one cell."""
    kept = {name: row[name] for name in ("network", "stage", "size")}
    shares = [name for name in row if name.endswith(" %") and not name.startswith("±")]
    return kept | {name: f"{row[name]:.1f} ± {row[f'± {name}']:.1f}" for name in shares}


COMMAND = Command("Measure how far a network's features see: their effective receptive fields.", add_options, run)
