"""``overlock convert IN OUT``."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command, add_target, claim_target


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("source", type=str, metavar="IN", help="The authors' checkpoint, or one of ours.")
    add_target(parser, "target")
    parser.add_argument("--model", type=str | None, default=None, help="Told from the shapes unless given.")


def run(options: Namespace, console: Console) -> None:
    from overlock.checkpoints import load_model, save_model  # noqa: PLC0415

    target = claim_target(options.target, [options.source], overwrite=options.overwrite)
    network, record = load_model(options.source, model=options.model)
    save_model(target, network.state_dict(), record)
    console.print(f"{target}: {record.name}, {len(record.classes)} classes")


COMMAND = Command("Turn any checkpoint of OverLoCK into one self-contained file.", add_options, run)
