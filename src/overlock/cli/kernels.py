"""``overlock kernels IMAGE... --at X Y``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command, add_overwrite
from overlock.cli.subjects import (
    Subject,
    add_network,
    add_save,
    as_csv,
    claim_results,
    find_files,
    open_subject,
    print_rows,
    read_images,
)
from overlock.files import Outputs, write_atomically

if TYPE_CHECKING:
    from PIL import Image

    from overlock.analysis.dynamic_kernels import Mixing, Replace


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "images", nargs="+", type=str, metavar="IMAGE",
        help="Images, or folders of such. The first is drawn; what the context prior does is measured over all.",
    )  # fmt: skip
    parser.add_argument(
        "--at", type=float, nargs=2, metavar=("X", "Y"), default=None,
        help="The point whose kernels are shown, in pixels of the first image; its middle unless given.",
    )  # fmt: skip
    parser.add_argument(
        "--image_size", type=int | None, default=None, help="Short side in pixels; the network's own unless given."
    )
    add_network(parser)
    add_save(parser, "the changes of each block", "the kernels over the first image")
    add_overwrite(parser)


def run(options: Namespace, console: Console) -> None:
    from overlock.analysis.backbones import Preparation, find_overlock  # noqa: PLC0415
    from overlock.analysis.dynamic_kernels import record_mixing, replaced_prior  # noqa: PLC0415
    from overlock.analysis.kernel_picture import draw_kernels  # noqa: PLC0415
    from overlock.analysis.prior_study import PriorStudy  # noqa: PLC0415
    from overlock.data.files import read_image  # noqa: PLC0415
    from overlock.deploy.picture import encode  # noqa: PLC0415
    from overlock.tasks.features import find_backbone  # noqa: PLC0415

    outputs = Outputs([options.checkpoint] if options.checkpoint else [], overwrite=options.overwrite)
    files = find_files(options.images, outputs)
    targets = claim_results(options.save, outputs)
    subject = open_subject(options)
    overlock, backbone = find_overlock(subject.network, subject.name), find_backbone(subject.network)
    prepare = Preparation(subject.network, subject.record, options.image_size)
    study = PriorStudy(overlock, backbone)
    first = read_image(files[0])
    point = _point(options.at, first, files[0])
    with subject.cast:
        for _, image in read_images(files, "kernels"):
            study.add(prepare(image).to(subject.device))
        priors: dict[str, Replace] = {"own": lambda prior: prior, **study.replacements()}
        if len(files) == 1:
            del priors["other image's"]  # it is its own
        mixings = {}
        for name, replace in priors.items():
            with replaced_prior(overlock, replace):
                mixings[name] = record_mixing(overlock, partial(backbone, prepare(first).to(subject.device)))
    rows = study.rows()
    for path, is_picture in targets.items():
        content = encode(draw_kernels(first, point, mixings), path) if is_picture else as_csv(rows)
        write_atomically(path, content)
    if options.json:
        shown = [
            dict(prior=name, **_values(mixing, point, first.size))
            for name, blocks in mixings.items()
            for mixing in blocks
        ]
        console.print_json(json.dumps(dict(image=str(files[0]), at=point, blocks=shown, changes=rows)))
        return
    print_rows(console, _by_place(rows), title=_title(subject, len(files)))
    console.print("kernels: share of a kernel's weight that moves to other taps; affinity, features: relative change")
    if len(files) == 1:
        console.print("with more images, another image's prior is put in as well")


def _title(subject: Subject, count: int) -> str:
    return f"{subject.name}: what changes with another context prior, mean of {count} image{'s' if count > 1 else ''}"


def _by_place(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each replacement and block, a column for each measure."""
    measures = dict.fromkeys(row["measure"] for row in rows)
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["prior"], row["where"]
        empty = dict(prior=key[0], where=key[1], **dict.fromkeys(measures, ""))
        table.setdefault(key, empty)[row["measure"]] = f"{row['mean']:.3f} ± {row['deviation']:.3f}"
    return list(table.values())


def _point(at: Sequence[float] | None, image: Image.Image, file: object) -> tuple[float, float]:
    if at is None:
        return image.width / 2, image.height / 2
    x, y = at
    if not (0 <= x < image.width and 0 <= y < image.height):
        raise ValueError(f"--at {x:g} {y:g} lies outside of {file}, which is {image.width} x {image.height} pixels")
    return x, y


def _values(mixing: Mixing, point: tuple[float, float], size: tuple[int, int]) -> dict[str, Any]:
    """The numbers of a point."""
    from overlock.analysis.kernel_picture import position_of  # noqa: PLC0415

    i, j = position_of(point, size, mixing.affinity.shape[2:4])
    return dict(
        stage=mixing.stage, block=mixing.block, position=[i, j], affinity=mixing.affinity[0, :, i, j].tolist(),
        kernels=[one.taps[0, :, i, j].tolist() for one in mixing.kernels],
    )  # fmt: skip


COMMAND = Command(
    "Draw the kernels that ContMix makes at a point, and measure what they owe to the context prior.", add_options, run
)
