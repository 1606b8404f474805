"""``overlock demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command, add_runtime


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "--checkpoint", type=str | None, default=None,
        help="OverLoCK to look through: a run's folder, a file of weights, or hf-hub:USER/NAME; the package's own "
        "small network unless given.",
    )  # fmt: skip
    parser.add_argument("--model", type=str | None, default=None, help="Model of a checkpoint that does not say.")
    parser.add_argument(
        "--beside", type=str | None, default=None,
        help="Another classifier to compare it with: a checkpoint, or a model of timm's, whose weights are fetched.",
    )  # fmt: skip
    parser.add_argument("--detector", type=str | None, default=None, help="Checkpoint of a detector, for its tab.")
    parser.add_argument("--segmenter", type=str | None, default=None, help="Checkpoint of a segmenter, for its tab.")
    parser.add_argument(
        "--photos", type=str | None, default=None,
        help="Folder of photos to choose from; examples/photos of a clone unless given.",
    )  # fmt: skip
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help="Address to serve at; 0.0.0.0 lets other machines in."
    )
    parser.add_argument("--port", type=int, default=7860, help="Port to serve at.")
    parser.add_argument("--max_megabytes", type=int, default=20, help="Most that an upload may have.")
    parser.add_argument("--max_pixels", type=int, default=50_000_000, help="Most that a photo may have.")
    add_runtime(parser)


def run(options: Namespace, console: Console) -> None:
    for name in ("max_megabytes", "max_pixels", "port"):
        if options[name] < 1:
            raise ValueError(f"--{name} must be at least 1, got {options[name]}")
    try:
        from overlock.demo.page import make_page, serve  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"the page needs a package that is not installed ({error.name}); run: pip install 'overlock[demo]'"
        ) from None
    from overlock.demo.network import Network, Runtime  # noqa: PLC0415
    from overlock.demo.stock import Stock  # noqa: PLC0415
    from overlock.demo.uploads import find_photos  # noqa: PLC0415
    from overlock.deploy import Detector, Segmenter  # noqa: PLC0415
    from overlock.deploy.classify import DEFAULT_FILE  # noqa: PLC0415

    runtime = Runtime(options.device, options.precision)
    given = dict(device=options.device, precision=options.precision)
    stock = Stock(
        network=Network(options.checkpoint or str(DEFAULT_FILE), model=options.model, runtime=runtime),
        beside=Network(options.beside, runtime=runtime) if options.beside else None,
        detector=Detector.from_checkpoint(options.detector, **given) if options.detector else None,
        segmenter=Segmenter.from_checkpoint(options.segmenter, **given) if options.segmenter else None,
        photos=find_photos(Path(options.photos) if options.photos else None),
        max_pixels=options.max_pixels,
    )
    page = make_page(stock)
    address = serve(page, host=options.host, port=options.port, max_megabytes=options.max_megabytes)
    console.print(f"the page is at {address} until Ctrl-C")
    page.block_thread()


COMMAND = Command("Open a page to look at photos through a network, in the browser.", add_options, run)
