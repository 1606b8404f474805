"""What the commands that look into networks have in common: a network, its images, and where results go."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import track

from overlock.cli.command import add_runtime
from overlock.files import Outputs

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

    from overlock.checkpoints import Record

TABLES, PICTURES = (".csv",), (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network that is looked into."""

    name: str
    """What tables call it."""
    network: nn.Module
    """In evaluation mode, on its device, not fused."""
    record: Record
    device: torch.device
    cast: torch.autocast
    """The context it computes in."""


def add_network(parser: ArgumentParser) -> None:
    """The options that :func:`open_subject` reads."""
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        default=None,
        help="A run's folder, a file of weights, hf-hub:USER/NAME, or a model of timm's; the package's own network "
        "unless given.",
    )
    parser.add_argument("--model", type=str | None, default=None, help="Model of a checkpoint that does not say.")
    add_runtime(parser)


def open_subject(options: Namespace) -> Subject:
    """The network that the options name.

    Raises:
        ValueError: for a missing, damaged or foreign one, or a device that is not there.
    """
    from overlock.deploy.classify import DEFAULT_FILE  # noqa: PLC0415
    from overlock.deploy.models import load_network  # noqa: PLC0415

    source = options.checkpoint or DEFAULT_FILE
    network, record = load_network(source, model=options.model)
    return make_subject(name_of(str(source)), network, record, options)


def named_source(word: str) -> str:
    """What a word for a network stands for: 'default' for the file that comes with the package, others themselves."""
    from overlock.deploy.classify import DEFAULT_FILE  # noqa: PLC0415

    return str(DEFAULT_FILE) if word == "default" else word


def name_of(source: str) -> str:
    """What tables call a network: a file's name without its ending, a folder's name, or timm's name."""
    path = Path(source)
    return path.stem if path.is_file() else path.name or source


def make_subject(name: str, network: nn.Module, record: Record, options: Namespace) -> Subject:
    """A network where the options of the runtime want it."""
    from overlock.deploy.runtime import autocast_to, choose_device  # noqa: PLC0415

    device = choose_device(options.device)
    cast = autocast_to(options.precision, device)
    return Subject(name=name, network=network.eval().to(device), record=record, device=device, cast=cast)


def find_files(words: Iterable[str], outputs: Outputs) -> list[Path]:
    """The images that words name: files and folders.

    Raises:
        ValueError: for a missing one, and a folder without images.
    """
    from overlock.data.files import find_images  # noqa: PLC0415

    files = find_images(words)
    for file in files:
        outputs.add_input(file)
    return files


def read_images(files: Sequence[Path], what: str) -> Iterator[tuple[Path, Image.Image]]:
    """Images one by one, with a bar of progress at a terminal."""
    from overlock.data.files import read_image  # noqa: PLC0415

    bar = Console(stderr=True)
    shown = track(files, description=what, console=bar, transient=True, disable=not bar.is_terminal)
    yield from ((file, read_image(file)) for file in shown)


def add_save(parser: ArgumentParser, csv_holds: str, picture_shows: str) -> None:
    """The option that :func:`claim_results` reads."""
    parser.add_argument(
        "--save",
        action="append",
        type=str,
        default=[],
        help=f"May be given several times. FILE.csv: {csv_holds}. FILE.png or .jpg: {picture_shows}.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def claim_results(names: Sequence[str], outputs: Outputs) -> dict[Path, bool]:
    """The files to write, before there is work to lose, and whether each is a picture.

    Raises:
        ValueError: for another ending, or a file that may not be written.
    """
    found = {}
    for name in names:
        path = Path(name)
        if path.suffix.lower() not in TABLES + PICTURES:
            raise ValueError(f"{name}: results are written as .csv, or drawn as .png or .jpg; end the name so")
        found[outputs.claim(path)] = path.suffix.lower() in PICTURES
    return found


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the same columns as a table."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
    )
    return buffer.getvalue()


def print_rows(console: Console, rows: Sequence[dict[str, Any]], *, title: str) -> None:
    """The same for people."""
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=title)
    for name in rows[0]:
        justify: Any = "left" if isinstance(rows[0][name], str) else "right"
        table.add_column(name.replace("_", " "), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
