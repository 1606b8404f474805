"""``overlock demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command, add_overwrite, add_runtime
from overlock.extras import missing_extra
from overlock.files import Outputs

HOST, PORT = "127.0.0.1", 7860


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
    parser.add_argument("--host", type=str, default=HOST, help="Address to serve at; 0.0.0.0 lets other machines in.")
    parser.add_argument("--port", type=int, default=PORT, help="Port to serve at.")
    parser.add_argument("--max_megabytes", type=int, default=20, help="Most that an upload may have.")
    parser.add_argument("--max_pixels", type=int, default=50_000_000, help="Most that a photo may have.")
    parser.add_argument(
        "--export", type=str | None, default=None, metavar="DIR",
        help="Serve nothing; write a folder that any web host can serve: the browser itself runs the network.",
    )  # fmt: skip
    parser.add_argument(
        "--runtime", type=str | None, default=None, metavar="FILE.tgz",
        help="With --export: the archive of npm's onnxruntime-web, for a machine that cannot fetch it.",
    )  # fmt: skip
    add_overwrite(parser)
    add_runtime(parser)


SERVED = {"beside": None, "detector": None, "segmenter": None, "host": HOST, "port": PORT, "device": None,
          "precision": "fp32"}  # fmt: skip
"""Options that mean nothing to the folder of ``--export``, and what they are unless given."""


def run(options: Namespace, console: Console) -> None:
    for name in ("max_megabytes", "max_pixels", "port"):
        if options[name] < 1:
            raise ValueError(f"--{name} must be at least 1, got {options[name]}")
    if options.export is not None:
        export(options, console)
    elif options.runtime is not None or options.overwrite:
        raise ValueError("--runtime and --overwrite go with --export DIR; leave them out to serve the page")
    else:
        open_page(options, console)


def export(options: Namespace, console: Console) -> None:
    """Write the page as a folder that the browser runs alone."""
    for name, unless_given in SERVED.items():
        if options[name] != unless_given:
            raise ValueError(f"--{name} is for the page that is served; leave it out with --export")
    from overlock.demo.static.folder import Limits, check_network, write_page  # noqa: PLC0415
    from overlock.demo.static.web_runtime import find_archive  # noqa: PLC0415
    from overlock.demo.uploads import find_photos  # noqa: PLC0415
    from overlock.deploy.classify import DEFAULT_FILE  # noqa: PLC0415
    from overlock.deploy.models import load_network  # noqa: PLC0415

    source = options.checkpoint or str(DEFAULT_FILE)
    network, record = load_network(source, model=options.model)
    given = [path for path in (options.checkpoint, options.photos) if path and Path(path).exists()]
    folder = Outputs(given, overwrite=options.overwrite).claim_folder(options.export)
    archive = find_archive(Path(options.runtime) if options.runtime else None, console)
    with console.status("writing the graphs, and checking them on each photo"):
        difference = write_page(
            check_network(network, record, source), record, folder,
            name=Path(source).stem if Path(source).is_file() else Path(source).name,
            photos=find_photos(Path(options.photos) if options.photos else None), archive=archive,
            limits=Limits(megabytes=options.max_megabytes, pixels=options.max_pixels),
        )  # fmt: skip
    console.print(f"the page is in {folder}; its graphs differ from PyTorch by {difference:.0e} at most")
    console.print(f"look at it: python -m http.server --bind 127.0.0.1 --directory {folder}", soft_wrap=True)


def open_page(options: Namespace, console: Console) -> None:
    """Serve the page until Ctrl-C."""
    try:
        from overlock.demo.page import make_page, serve  # noqa: PLC0415
    except ImportError as error:
        raise missing_extra(f"the page needs a package that is not installed ({error.name})", "demo") from None
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
