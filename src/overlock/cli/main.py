"""The command line as a whole: the parser, and one sentence for every fault."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from functools import partial
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from rich.console import Console
from rich.logging import RichHandler

from overlock.cli import (
    ablate,
    average,
    benchmark,
    cam,
    convert,
    demo,
    duplicates,
    embed,
    erf,
    evaluate,
    kernels,
    pack,
    predict,
    probe,
    push,
    search,
    summary,
    tradeoff,
    train,
)
from overlock.cli import compile as compile_
from overlock.cli import export as export_
from overlock.cli.faults import command_of, explain, last_sentence
from overlock.cli.lists import join_lists
from overlock.settings import renew_options
from overlock.version import __version__

USER_FAULT, INTERRUPTED = 2, 130

COMMANDS = {
    "train": train.COMMAND,
    "evaluate": evaluate.COMMAND,
    "predict": predict.COMMAND,
    "embed": embed.COMMAND,
    "search": search.COMMAND,
    "duplicates": duplicates.COMMAND,
    "probe": probe.COMMAND,
    "push": push.COMMAND,
    "pack": pack.COMMAND,
    "summary": summary.COMMAND,
    "ablate": ablate.COMMAND,
    "tradeoff": tradeoff.COMMAND,
    "kernels": kernels.COMMAND,
    "erf": erf.COMMAND,
    "cam": cam.COMMAND,
    "demo": demo.COMMAND,
    "average": average.COMMAND,
    "convert": convert.COMMAND,
    "compile": compile_.COMMAND,
    "export": export_.COMMAND,
    "benchmark": benchmark.COMMAND,
}

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, that of the process by default.

    Returns:
        The exit code: 0; 2 for a fault of the user's, told in one sentence on stderr; 130 after Ctrl-C, and 128 more
        than the signal's number after another one.
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    words = [_with_underscores(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    # Names of classes and files are printed as they are, not read as markup.
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    subparsers: dict[str, ArgumentParser] = {}
    _show_notes(errors)
    arguments = words
    try:
        tell = partial(errors.print, "note:", markup=False)
        arguments = train.renew_config(renew_options(words, tell), tell)
        parser, subparsers = make_parser(arguments)
        subparser = subparsers.get(command_of(arguments) or "")
        options = parser.parse_args(arguments if subparser is None else join_lists(arguments, subparser))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' notes to programmers
            return COMMANDS[options.subcommand].run(options[options.subcommand], console) or 0
    except ArgumentError as error:
        sentence = explain(error, arguments, subparsers)
    except (ValueError, ImportError) as error:  # the latter says what to install
        sentence = last_sentence(error)
    except KeyboardInterrupt:
        errors.print("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, say head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # of the machine, say a full disk
        sentence = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    errors.print("[red]error:[/red]", end=" ")
    errors.print(sentence, markup=False)
    return USER_FAULT


def _show_notes(errors: Console) -> None:
    """Like progress bars, the package's own notes on what takes long are for people at a terminal."""
    logger = logging.getLogger("overlock")
    if errors.is_terminal and not logger.handlers:
        logger.addHandler(RichHandler(console=errors, show_time=False, show_level=False, show_path=False))
        logger.setLevel(logging.INFO)


def make_parser(arguments: Sequence[str] = ()) -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The parser of the whole command line, and those of the sub-commands.

    Args:
        arguments: the command line. Of the sub-commands the one that it names has its options, on which its words may
            tell; making those of all would take longer than the rest of a call.
    """
    named = command_of(arguments)
    settings: dict[str, Any] = dict(exit_on_error=False, allow_abbrev=False)
    parser = ArgumentParser(
        prog="overlock", description="OverLoCK: train, evaluate, predict, count.", version=__version__, **settings
    )
    subcommands = parser.add_subcommands(metavar="COMMAND", title="commands", description="", help="")
    subparsers = {}
    for name, command in COMMANDS.items():
        subparsers[name] = ArgumentParser(description=command.summary, **settings)
        if name == named:
            command.add_options(subparsers[name], arguments[arguments.index(name) + 1 :])
        subcommands.add_subcommand(name, subparsers[name], help=command.summary)
    return parser, subparsers


def _with_underscores(word: str) -> str:
    """Options are named as the fields they set; --image-size is taken for --image_size."""
    option, equals, value = word.partition("=")
    return option[:2] + option[2:].replace("-", "_") + equals + value if word.startswith("--") else word
