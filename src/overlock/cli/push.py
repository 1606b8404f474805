"""``overlock push RUN USER/NAME``."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("run", type=str, metavar="RUN", help="Folder of a finished run.")
    parser.add_argument("repository", type=str, metavar="USER/NAME", help="Where on the Hugging Face hub.")
    parser.add_argument("--private", action="store_true", help="Make a new repository private.")
    parser.add_argument("--revision", type=str, metavar="BRANCH", help="Branch to upload to, made where there is none.")


def run(options: Namespace, console: Console) -> None:
    from overlock.checkpoints import push  # noqa: PLC0415

    url = push(options.run, options.repository, private=options.private, revision=options.revision)
    name = options.repository + (f"@{options.revision}" if options.revision else "")
    console.print(f"{url}: overlock predict IMAGE --checkpoint hf-hub:{name} uses it")


COMMAND = Command("Upload a trained model to the Hugging Face hub.", add_options, run)
