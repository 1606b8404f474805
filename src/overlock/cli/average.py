"""``overlock average CHECKPOINT... --output OUT``."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command, add_target, claim_target


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "checkpoints",
        type=str,
        nargs="+",
        metavar="CHECKPOINT",
        help="Folders of runs or files of weights; two or more.",
    )
    add_target(parser, "--output")


def run(options: Namespace, console: Console) -> None:
    from torch.optim.swa_utils import AveragedModel  # noqa: PLC0415

    from overlock.checkpoints import load_model, save_model  # noqa: PLC0415

    first, *others = options.checkpoints
    if not others:
        raise ValueError(f"{first}: a mean takes two checkpoints or more; name the others too")
    target = claim_target(options.output, options.checkpoints, overwrite=options.overwrite)
    network, record = load_model(first)
    mean = AveragedModel(network, use_buffers=True)
    mean.update_parameters(network)
    for path in others:
        network, its_record = load_model(path)
        if its_record != record:
            raise ValueError(
                f"{path}: differs from {first} in model, classes or preparation of images; train both alike"
            )
        mean.update_parameters(network)
    save_model(target, mean.module.state_dict(), record)
    console.print(f"{target}: the mean of {len(options.checkpoints)} checkpoints of {record.name}")


COMMAND = Command(
    "Write the mean of several trainings' weights, which can be better than each of them.", add_options, run
)
