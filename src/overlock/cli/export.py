"""``overlock export CHECKPOINT --format FORMAT``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from overlock.cli.command import Command, add_overwrite
from overlock.cli.subjects import find_files, name_of, named_source
from overlock.files import Outputs

if TYPE_CHECKING:
    from overlock.export import Report

AXES = ("batch", "size")
FEW = 0.8  # of the multiply-adds, from which on int8 is worth its name


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "checkpoint",
        type=str,
        metavar="CHECKPOINT",
        help="A run's folder, a file of weights, hf-hub:USER/NAME, or a model of timm's with published weights; "
        "'default' for the package's own network.",
    )
    parser.add_argument("--model", type=str | None, default=None, help="Model of a checkpoint that does not say.")
    parser.add_argument(
        "--format",
        type=Literal["onnx", "openvino", "torch-export", "aoti", "executorch"],
        required=True,
        help="Runtime of the file: ONNX Runtime, OpenVINO, torch.export, AOTInductor or ExecuTorch (XNNPACK).",
    )
    parser.add_argument(
        "--task",
        type=Literal["classify", "features", "detect", "segment"] | None,
        default=None,
        help="What the file gives; the checkpoint's own task unless given.",
    )
    parser.add_argument(
        "--precision", type=Literal["fp32", "fp16", "bf16", "int8"], default="fp32", help="Of the file."
    )
    parser.add_argument(
        "--dynamic", type=str, default="", metavar="batch,size", help="What may differ from call to call: batch, size."
    )
    parser.add_argument(
        "--with_preprocessing", action="store_true", help="Take pixels of 0 to 255 and normalise them in the graph."
    )
    parser.add_argument(
        "--image_size", type=int, nargs=2, metavar=("H", "W"), default=None,
        help="Height and width of the images; those that the checkpoint was trained at unless given.",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=list[str], default=[], metavar="IMAGE ...",
        help="Images, or folders of such, that the file is compared with PyTorch on, and int8 is calibrated on; a "
        "photograph of the package unless given.",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=str | None, default=None, metavar="FILE", help="File to write; beside the checkpoint's name."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    add_overwrite(parser)


def run(options: Namespace, console: Console) -> None:
    from overlock.deploy.models import load_network  # noqa: PLC0415
    from overlock.export import Spec, export_network  # noqa: PLC0415
    from overlock.export.parity import PHOTO  # noqa: PLC0415
    from overlock.export.spec import ENDINGS  # noqa: PLC0415

    source = named_source(options.checkpoint)
    outputs = Outputs([source] if Path(source).exists() else [], overwrite=options.overwrite)
    photos = find_files(options.images, outputs) if options.images else [PHOTO]
    path = outputs.claim(options.output or name_of(source) + ENDINGS[options.format])
    dynamic = _axes(options.dynamic)
    network, record = load_network(source, model=options.model)
    size = options.image_size or record.preprocessing.get("input_size", (3, 512, 512))[1:]
    task: Any = options.task or record.task
    spec = Spec(
        record=record, format=options.format, task=task, image_size=(size[0], size[1]),
        precision=options.precision, dynamic=dynamic, with_preprocessing=options.with_preprocessing,
    )  # fmt: skip
    _print(export_network(network, spec, path, photos=photos), path, console, as_json=options.json)


def _axes(words: str) -> tuple[Literal["batch", "size"], ...]:
    given = [word.strip() for word in words.split(",") if word.strip()]
    wrong = [word for word in given if word not in AXES]
    if wrong:
        raise ValueError(f"--dynamic must be batch, size or batch,size, got {wrong[0]!r}")
    return tuple(axis for axis in AXES if axis in given)  # type: ignore[misc]


def _print(report: Report, path: Path, console: Console, *, as_json: bool) -> None:
    names = ("images", "output", "difference")
    rows = [(list(one.shape), one.output, one.difference) for one in report.agreements]
    if as_json:
        content = dict(
            file=str(path), agreements=[dict(zip(names, row, strict=True)) for row in rows],
            seconds=dict(report.seconds), kept_in_float=report.kept_in_float, int8_share=report.int8_share,
        )  # fmt: skip
        console.print_json(json.dumps(content))
        return
    table = Table(*names, title=f"{path}, beside PyTorch")
    for shape, output, difference in rows:
        table.add_row(" x ".join(map(str, shape)), str(output), f"{difference:.1e}")
    console.print(table)
    if report.int8_share is not None:
        few = "" if report.int8_share >= FEW else f", less than {100 * FEW:.0f} %"
        kept = ", ".join(report.kept_in_float) or "nothing"
        console.print(f"int8 covers {100 * report.int8_share:.1f} % of the multiply-adds{few}; kept in float: {kept}")
    ours, theirs = report.seconds["file"], report.seconds["overlock.fuse"]
    told = "" if ours <= theirs else ": the file is slower"
    console.print(f"an image takes {1e3 * ours:.1f} ms, with overlock.fuse {1e3 * theirs:.1f} ms{told}")


COMMAND = Command("Write a network as a file for ONNX Runtime, OpenVINO and others.", add_options, run)
