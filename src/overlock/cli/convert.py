"""``overlock convert IN OUT``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("source", type=str, metavar="IN", help="The authors' checkpoint, or one of ours.")
    parser.add_argument("target", type=str, metavar="OUT.safetensors", help="File to write.")
    parser.add_argument("--model", type=str | None, default=None, help="Told from the shapes unless given.")
    parser.add_argument("--force", action="store_true", help="Replace a file that is there.")


def run(options: Namespace, console: Console) -> None:
    from overlock.checkpoint import load_classifier, save_model  # noqa: PLC0415

    target = Path(options.target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: the name of the converted file must end in .safetensors")
    if target.exists() and not options.force:
        raise ValueError(f"{target}: exists already; choose another name or pass --force")
    network, record = load_classifier(options.source, model=options.model)
    save_model(target, network.state_dict(), record)
    console.print(f"{target}: {record.model}, {len(record.classes)} classes")


COMMAND = Command("Turn any checkpoint of OverLoCK into one self-contained file.", add_options, run)
