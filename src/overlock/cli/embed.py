"""``overlock embed IMAGES --out DIR``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import track

from overlock.cli.command import Command, add_overwrite, add_runtime, ended_by_sigterm
from overlock.files import Outputs

if TYPE_CHECKING:
    from overlock.deploy import Embedder
    from overlock.embeddings.run import Report

SOME_FAILED, ALL_FAILED = 1, 2


def add_checkpoint(parser: ArgumentParser) -> None:
    """The network that embeds."""
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        default=None,
        help="Folder of a run, file of weights, hf-hub:USER/NAME, or name of a timm model with published weights; of "
        "any task. Without it, the small model that comes with the package, trained on CIFAR-10.",
    )
    parser.add_argument("--model", type=str | None, default=None, help="Model of a checkpoint that does not say.")


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "images",
        type=str,
        metavar="IMAGES",
        help="Folder of images, in folders by class or not, or of .tar files of images, such as WebDataset's shards.",
    )
    parser.add_argument(
        "--out",
        type=str,
        required=True,
        metavar="DIR",
        help="Folder for the Parquet shards. The same command again goes on with those that are not there yet.",
    )
    add_checkpoint(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="Images in a batch.")
    parser.add_argument("--shard_images", type=int, default=4096, help="Images in a shard.")
    parser.add_argument("--workers", type=int, default=2, help="Processes that load images, ahead of the network.")
    add_runtime(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON instead of sentences.")
    add_overwrite(parser)


def run(options: Namespace, console: Console) -> int:
    from overlock.embeddings.processes import this_process  # noqa: PLC0415
    from overlock.embeddings.run import EmbedOptions, embed, make_origin  # noqa: PLC0415
    from overlock.embeddings.shards import import_package  # noqa: PLC0415
    from overlock.embeddings.sources import ImageList  # noqa: PLC0415

    import_package("pyarrow.parquet")
    settings = EmbedOptions(
        batch_size=options.batch_size, shard_images=options.shard_images, workers=options.workers,
        overwrite=options.overwrite,
    )  # fmt: skip
    process = this_process()
    folder = Outputs(overwrite=True).claim_folder(options.out)  # before the work; what lies in it is looked at later
    images = ImageList(Path(options.images))
    for note in images.notes:
        tell(note)
    device = options.device
    if device is None and process.world > 1:
        device = gpu_of(process.local_rank)
    embedder = load_embedder(options.checkpoint, model=options.model, device=device, precision=options.precision)
    if _must_compile(embedder):
        tell("compiling kernels for this processor first, once, which takes half a minute")
    origin = make_origin(embedder, images, options.checkpoint, settings)
    with ended_by_sigterm():
        report = embed(
            embedder, images, folder, origin, settings, process=process,
            tell=lambda problem: tell(f"skipped {problem}"), watch=_with_progress,
        )  # fmt: skip
    place = f"process {process.rank} of {process.world}: " if process.world > 1 else ""
    if options.json:
        sys.stdout.write(json.dumps(_as_json(report)) + "\n")
    else:
        for line in _lines(report, options.out):
            console.print(place + line)
    failed = len(report.failures) + len(report.kept_failures)
    if failed:
        tell(f"{place}{failed} of {report.own_images} images have no vector; see the column error")
    if not failed or process.world > 1:  # where one process fails, launchers end the others
        return 0
    return SOME_FAILED if failed < report.own_images else ALL_FAILED


def _must_compile(embedder: Embedder) -> bool:
    """Whether the first pass waits for kernels."""
    from overlock.kernels.numba import cache  # noqa: PLC0415
    from overlock.network import VARIANTS  # noqa: PLC0415

    is_ours = embedder.record.model.partition(".")[0] in VARIANTS
    return is_ours and embedder.device.type == "cpu" and not cache.are_compiled()


def gpu_of(local_rank: int) -> str | None:
    """The GPU of one of several processes on this machine; None without GPUs."""
    import torch  # noqa: PLC0415

    count = torch.cuda.device_count()
    return f"cuda:{local_rank % count}" if count else None


def load_embedder(checkpoint: str | None, *, model: str | None, device: str | None, precision: Any) -> Embedder:
    """The network that embeds; the package's own unless one is named."""
    from overlock.deploy import Embedder  # noqa: PLC0415

    if checkpoint is None:
        return Embedder.default(device=device, precision=precision)
    return Embedder.from_checkpoint(checkpoint, model=model, device=device, precision=precision)


def tell(sentence: str) -> None:
    """On stderr, so that the output stays what it is."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(sentence)


def _with_progress(batches: Iterator[Any], count: int) -> Iterator[Any]:
    bar = Console(stderr=True)
    return iter(
        track(batches, description="embed", total=count, console=bar, transient=True, disable=not bar.is_terminal)
    )


def _lines(report: Report, out: str) -> Iterator[str]:
    origin = report.origin
    if report.kept:
        yield f"{report.kept} shards are there already"
    if not report.shards:
        yield f"{out}: nothing left to do"
        return
    yield f"{out}: {report.images} vectors of {origin.dim} numbers by {origin.model}, in {report.shards} new shards"
    share = 100 * report.speed / report.bare_speed
    yield (
        f"{report.seconds:.1f} s, {report.speed:.1f} images/s, which is {share:.0f} % of the "
        f"{report.bare_speed:.1f} of the network alone"
    )


def _as_json(report: Report) -> dict[str, Any]:
    speeds = dict(speed=report.speed, bare_speed=report.bare_speed)
    known = {name: None if math.isnan(value) else value for name, value in speeds.items()}
    return asdict(report) | known


COMMAND = Command("Write the vectors of many images as Parquet shards, for search and probes.", add_options, run)
