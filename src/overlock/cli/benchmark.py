"""``overlock benchmark FILE|MODEL ...``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import track

from overlock.cli.command import Command, add_overwrite
from overlock.cli.subjects import add_save, as_csv, claim_results, named_source, print_rows
from overlock.files import Outputs, write_atomically

if TYPE_CHECKING:
    from overlock.deploy.benchmark import Timing


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "sources", nargs="+", type=str, metavar="FILE|MODEL",
        help="Files of overlock export, runs' folders, files of weights, or models of timm's, whose weights are then "
        "untrained; 'default' for the package's own network.",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=1, help="Images in a batch.")
    parser.add_argument(
        "--image_size", type=int, nargs=2, metavar=("H", "W"), default=None,
        help="Height and width of the images; each network's own unless given.",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=30, help="Batches of each network, which take turns.")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads; PyTorch's choice unless given.")
    parser.add_argument(
        "--data", type=str | None, default=None, help="Labelled images that the accuracy of classifiers is measured on."
    )
    add_save(parser, "all that was measured", "latencies as bars")
    add_overwrite(parser)


def run(options: Namespace, console: Console) -> None:
    for name in ("batch_size", "rounds", "threads"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"--{name} must be at least 1, got {options[name]}")
    options.sources = [named_source(word) for word in options.sources]
    inputs = [word for word in (*options.sources, options.data) if word and Path(word).exists()]
    outputs = claim_results(options.save, Outputs(inputs, overwrite=options.overwrite))
    timings = _measure(options)
    rows = [
        {name: value for name, value in dataclasses.asdict(one).items() if name != "top1" or options.data}
        for one in timings
    ]
    if options.json:
        console.print_json(json.dumps(rows))
    else:
        title = f"ms a batch of {options.batch_size}, over {options.rounds} rounds in turns"
        print_rows(console, [_shorten(row) for row in rows], title=title)
    for path, is_picture in outputs.items():
        if is_picture:
            from overlock.deploy.benchmark import draw_timings  # noqa: PLC0415

            draw_timings(timings, path)
        else:
            write_atomically(path, as_csv(rows))


def _shorten(row: dict[str, Any]) -> dict[str, Any]:
    """What fits a terminal; the CSV file has all."""
    short = {
        "name": Path(row["name"]).name, "runtime": f"{row['runtime']} {row['precision']}", "p50": row["p50_ms"],
        "p90": row["p90_ms"], "start, s": row["startup_s"], "MB": row["memory_mb"],
    }  # fmt: skip
    return short | ({"top-1": row["top1"]} if "top1" in row else {})


def _measure(options: Namespace) -> list[Timing]:
    import torch  # noqa: PLC0415

    from overlock.deploy.benchmark import open_contender, take_turns  # noqa: PLC0415

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    bar = Console(stderr=True)
    quiet = not bar.is_terminal
    size = None if options.image_size is None else (options.image_size[0], options.image_size[1])
    contenders = [
        open_contender(source, batch=options.batch_size, image_size=size)
        for source in track(options.sources, description="load", console=bar, transient=True, disable=quiet)
    ]
    timings = take_turns(
        contenders, options.rounds,
        lambda rounds: track(
            rounds, description="measure", total=options.rounds, console=bar, transient=True, disable=quiet
        ),
    )  # fmt: skip
    if options.data is None:
        return timings
    from overlock.data import load_test_data  # noqa: PLC0415
    from overlock.deploy.evaluate_classification import evaluate_classifier  # noqa: PLC0415

    data = load_test_data(options.data)
    shares = [evaluate_classifier(one.source, data).top1 for one in contenders]
    return [dataclasses.replace(one, top1=share) for one, share in zip(timings, shares, strict=True)]


COMMAND = Command("Time networks and exported files side by side.", add_options, run)
