"""The command ``overlock``: parse, call, show. Each sub-command imports what it needs when it runs."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from rich.console import Console
from rich.table import Table

from overlock.version import __version__

USER_FAULT, INTERRUPTED = 2, 130

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Command(NamedTuple):
    """A sub-command: its line in the help, its options, and what it does."""

    summary: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, Console], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, that of the process by default.

    Returns:
        The exit code: 0; 2 for a fault of the user's, told in one sentence on stderr; 130 after Ctrl-C.
    """
    arguments = [_with_underscores(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    # Names of classes and files are printed as they are, not read as markup.
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    parser, subparsers = make_parser()
    try:
        options = parser.parse_args(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' notes to programmers
            COMMANDS[options.subcommand].run(options[options.subcommand], console)
    except ArgumentError as error:
        sentence = _explain(error, arguments, subparsers)
    except ValueError as error:
        sentence = _sentence(error)
    except KeyboardInterrupt:
        errors.print("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, say head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    else:
        return 0
    errors.print("[red]error:[/red]", end=" ")
    errors.print(sentence, markup=False)
    return USER_FAULT


def make_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The parser of the whole command line, and those of the sub-commands."""
    settings: dict[str, Any] = dict(exit_on_error=False, allow_abbrev=False)
    parser = ArgumentParser(
        prog="overlock", description="OverLoCK: train, predict, count.", version=__version__, **settings
    )
    subcommands = parser.add_subcommands(metavar="COMMAND", title="commands", description="", help="")
    subparsers = {}
    for name, command in COMMANDS.items():
        subparsers[name] = ArgumentParser(description=command.summary, **settings)
        command.add_options(subparsers[name])
        subcommands.add_subcommand(name, subparsers[name], help=command.summary)
    return parser, subparsers


def _with_underscores(word: str) -> str:
    """Options are named as the fields they set; --image-size is taken for --image_size."""
    option, equals, value = word.partition("=")
    return option[:2] + option[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _explain(error: ArgumentError, arguments: Sequence[str], subparsers: dict[str, ArgumentParser]) -> str:
    """One sentence for a command line that does not parse, with the nearest thing that would."""
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command not in subparsers:
        known = ", ".join(subparsers)
        near = difflib.get_close_matches(command or "", subparsers, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"the commands are {known}"
        return f"unknown command {command!r}; {mend}" if command else f"no command given; the commands are {known}"
    options = [option for action in subparsers[command]._actions for option in action.option_strings]
    for word in arguments:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in options:
            near = difflib.get_close_matches(option, options, n=1)
            mend = f"did you mean {near[0]}?" if near else f"see overlock {command} --help"
            return f"unknown option {option}; {mend}"
    message = " ".join(str(error).split()).replace(f"{command}.", "")
    return f"{message}; see overlock {command} --help"


def _sentence(error: ValueError) -> str:
    """The message alone, also where a loading process has wrapped it in its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix("ValueError: ") if "Traceback" in str(error) else " ".join(lines)


def _add_train(parser: ArgumentParser) -> None:
    from overlock.training import TrainConfig  # noqa: PLC0415

    parser.add_argument("--config", action="config", help="Read settings from a YAML file, as a run saves them.")
    parser.add_class_arguments(TrainConfig)
    parser.add_argument("--overwrite", action="store_true", help="Replace the files of an earlier run.")


def _train(options: Namespace, console: Console) -> None:
    from overlock.training import TrainConfig  # noqa: PLC0415
    from overlock.training.run import train  # noqa: PLC0415

    settings = {field.name: options[field.name] for field in dataclasses.fields(TrainConfig)}
    result = train(TrainConfig(**settings), overwrite=options.overwrite, console=console)
    console.print(f"test accuracy {100 * result.accuracy:.2f} % after {result.seconds:.0f} s; saved in {result.folder}")
    console.print(f"try: overlock predict IMAGE --checkpoint {result.folder}")


def _add_predict(parser: ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=str, metavar="IMAGE", help="Image files, or folders of them.")
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="Folder of a run, its model.safetensors, or a file of weights."
    )
    parser.add_argument("--model", type=str | None, default=None, help="Model of a file that does not say.")
    parser.add_argument("--top", type=int, default=5, help="How many classes to show.")
    parser.add_argument("--batch_size", type=int, default=32, help="Images a pass.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument("--save", type=str | None, default=None, help="Save a picture of the images and their classes.")


def _predict(options: Namespace, console: Console) -> None:
    from overlock.data import find_images  # noqa: PLC0415
    from overlock.deploy import Predictor  # noqa: PLC0415
    from overlock.deploy.picture import save_picture  # noqa: PLC0415

    paths = find_images(options.images)
    predictor = Predictor.from_checkpoint(options.checkpoint, model=options.model)
    predictions = predictor(paths, top=options.top, batch_size=options.batch_size)
    if options.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(p) for p in predictions], indent=2, ensure_ascii=False) + "\n")
    else:
        table = Table("image", *("class" if i == 0 else "" for i in range(len(predictions[0].labels))))
        for prediction in predictions:
            classes = zip(prediction.labels, prediction.probabilities, strict=True)
            table.add_row(Path(prediction.source).name, *(f"{label} {100 * share:.1f} %" for label, share in classes))
        console.print(table)
    if options.save:
        save_picture(options.save, predictions)


def _add_summary(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, metavar="MODEL", help="One of OverLoCK's sizes, such as overlock_t.")
    parser.add_argument(
        "--image_size", type=int, nargs=2, metavar=("H", "W"), default=[224, 224], help="Height and width in pixels."
    )


def _summary(options: Namespace, console: Console) -> None:
    from overlock.analysis import count_cost  # noqa: PLC0415
    from overlock.checkpoint import check_model_name  # noqa: PLC0415
    from overlock.network import VARIANTS  # noqa: PLC0415

    check_model_name(options.model)
    height, width = options.image_size
    costs = count_cost(options.model, image_size=(height, width))
    table = Table("part", title=f"{options.model}, merged, {height} x {width}")
    for title in ("parameters, M", "multiply-adds, G", "mixing, G"):
        table.add_column(title, justify="right")
    for cost in costs:
        style = "bold" if cost.name == "total" else None
        table.add_row(
            cost.name, f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e9:.3f}", f"{cost.mixing / 1e9:.3f}", style=style
        )
    paper = VARIANTS[options.model].paper
    if paper is not None and (height, width) == (224, 224):
        table.add_row("paper, Table 2", f"{paper.params:g}", f"{paper.macs:g}", "")
    console.print(table)
    console.print("mixing: the application of the dynamic kernels, which the paper's figures leave out")


def _add_convert(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=str, metavar="IN", help="The authors' checkpoint, or one of ours.")
    parser.add_argument("target", type=str, metavar="OUT.safetensors", help="File to write.")
    parser.add_argument("--model", type=str | None, default=None, help="Told from the shapes unless given.")
    parser.add_argument("--force", action="store_true", help="Replace a file that is there.")


def _convert(options: Namespace, console: Console) -> None:
    from overlock.checkpoint import load_classifier, save_classifier  # noqa: PLC0415

    target = Path(options.target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: the name of the converted file must end in .safetensors")
    if target.exists() and not options.force:
        raise ValueError(f"{target}: exists already; choose another name or pass --force")
    network, record = load_classifier(options.source, model=options.model)
    save_classifier(target, network.state_dict(), record)
    console.print(f"{target}: {record.model}, {len(record.classes)} classes")


COMMANDS = {
    "train": Command(
        "Train a classifier on a folder of images by class, or on handwritten digits.", _add_train, _train
    ),
    "predict": Command("Classify images.", _add_predict, _predict),
    "summary": Command("Parameters and multiply-adds of a model, beside the paper's.", _add_summary, _summary),
    "convert": Command("Turn any checkpoint of OverLoCK into one self-contained file.", _add_convert, _convert),
}

if __name__ == "__main__":
    sys.exit(main())
