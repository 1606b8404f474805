"""``overlock train RECIPE``."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command, needing_training
from overlock.files import Outputs
from overlock.settings import renew

if TYPE_CHECKING:
    from overlock.training import RunConfig


def add_options(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    from overlock.training import CONFIGS, RECIPES  # noqa: PLC0415

    recipes = "; ".join(
        f"{name}: {(recipe.__doc__ or '').splitlines()[0].rstrip('.')}" for name, recipe in RECIPES.items()
    )
    parser.add_argument("recipe", nargs="?", type=str | None, default=None, metavar="RECIPE", help=recipes)
    parser.add_argument("--config", action="config", help="Read settings from a YAML file, as a run saves them.")
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if name is not None and name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"the recipes are {', '.join(RECIPES)}"
        raise ValueError(f"unknown recipe {name!r}; {mend}")
    settings = _task_of_file(arguments) if name is None else _settings_of(RECIPES[name])
    parser.add_class_arguments(CONFIGS[settings["task"]])
    parser.add_argument("--resume", action="store_true", help="Go on with the run in the output folder, if any.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the files of an earlier run.")
    parser.set_defaults(_dotted(settings))


def _settings_of(recipe: Callable[[str], RunConfig]) -> dict[str, Any]:
    """A recipe's settings; without the data, where it has none of its own."""
    data = inspect.signature(recipe).parameters["data"].default
    settings = recipe("named below" if data is inspect.Parameter.empty else data).to_dict()
    if data is inspect.Parameter.empty:
        del settings["data"]
    return settings


def renew_config(arguments: Sequence[str], tell: Callable[[str], object]) -> list[str]:
    """The words of a command line, in which a file of settings with names of earlier versions is its content renewed.

    Args:
        arguments: the words.
        tell: called with a note on such a file.

    Raises:
        ValueError: for a setting that is there under both of its names.
    """
    renewed = list(arguments)
    for place, start, source in _configs(arguments):
        content = _read_settings(source)
        new = content if content is None else renew(content)
        if new is not None and new != content:
            renewed[place] = start + yaml.safe_dump(new, sort_keys=False, allow_unicode=True)
            tell(f"{source}: some of these settings have other names now; the new run's folder has them")
    return renewed


def _configs(arguments: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Of each file of settings, the place of its word, how that begins, and the path, or the content itself."""
    for place, word in enumerate(arguments):
        if word.startswith("--config="):
            yield place, "--config=", word.partition("=")[2]
        elif word == "--config" and place + 1 < len(arguments):
            yield place + 1, "", arguments[place + 1]


def _read_settings(source: str) -> dict[str, Any] | None:
    """The settings of a file, or of its content; None where there are none, of which the parser says what is wrong."""
    try:
        content = yaml.safe_load(source if "\n" in source else Path(source).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) and all(isinstance(name, str) for name in content) else None


def _task_of_file(arguments: Sequence[str]) -> dict[str, Any]:
    """The task that a file of settings names, on which the options depend; that of a classifier without."""
    contents = (_read_settings(source) or {} for _, _, source in _configs(arguments))
    task = next((content.get("task") for content in contents), None)
    return dict(task=task if task in ("detect", "segment") else "classify")


def _dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Groups of settings taken apart; the table of the model's further arguments is one setting."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        group = isinstance(value, dict) and name != "model_args"
        flat |= _dotted(value, f"{prefix}{name}.") if group else {f"{prefix}{name}": value}
    return flat


def run(options: Namespace, console: Console) -> int | None:
    from overlock.training import CONFIGS, RECIPES  # noqa: PLC0415

    if options.recipe is None and not options.get("config"):
        raise ValueError(f"no recipe given; the recipes are {', '.join(RECIPES)}; or give --config FILE")
    kind = CONFIGS[options.task]
    groups = {field.name: options[field.name] for field in dataclasses.fields(kind)}
    config = kind.from_dict({name: _plain(value) for name, value in groups.items()})
    _check_inputs(config)
    with needing_training():
        from overlock.training.run import train  # noqa: PLC0415
        from overlock.training.stop import RunStoppedError  # noqa: PLC0415
    try:
        train(config, overwrite=options.overwrite, resume=options.resume, console=console)
    except RunStoppedError as stopped:
        return 128 + stopped.signum
    return None


def _check_inputs(config: RunConfig) -> None:
    """Raise ValueError where a run would write into a folder of its data, or over the weights that it starts from."""
    names = ("data", "weights", "classes", "colours", "annotations", "images", "test_annotations", "test_images")
    inputs = [path for path in (getattr(config, name, None) for name in names) if path and Path(path).exists()]
    output = Path(config.output)
    Outputs(inputs, overwrite=True).check_folder(output)
    if config.weights and output.resolve() in Path(config.weights).resolve().parents:
        raise ValueError(f"{output}: the run starts from weights in this folder; choose another output")


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else value


COMMAND = Command("Train a classifier, detector or segmenter by a recipe.", add_options, run)
