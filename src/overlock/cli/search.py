"""``overlock search IMAGE... --index DIR``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command, add_overwrite, add_runtime
from overlock.cli.embed import add_checkpoint, load_embedder, tell
from overlock.cli.subjects import add_save, as_csv, claim_results, find_files, print_rows
from overlock.files import Outputs, write_atomically

if TYPE_CHECKING:
    from overlock.deploy import Embedder, Embedding
    from overlock.embeddings.index import Hits, Index, IndexOptions
    from overlock.embeddings.shards import Embeddings

Row = dict[str, Any]


def add_method(parser: ArgumentParser) -> None:
    """The options of how neighbours are found."""
    parser.add_argument(
        "--method", type=str, default="exact", metavar="{exact,ivf}",
        help="exact: compare with all vectors. ivf: with those of the nearest inverted lists alone, which are trained "
        "the first time and kept in the folder.",
    )  # fmt: skip
    parser.add_argument("--nlist", type=int | None, default=None, help="ivf: number of lists; 4 sqrt(N) unless given.")
    parser.add_argument(
        "--nprobe", type=int | None, default=None,
        help="ivf: lists that are looked through; a sixteenth of them unless given.",
    )  # fmt: skip


def method_of(options: Namespace) -> IndexOptions:
    """What :func:`add_method` added."""
    from overlock.embeddings.index import IndexOptions  # noqa: PLC0415

    return IndexOptions(method=options.method, nlist=options.nlist, nprobe=options.nprobe)


def add_moved(parser: ArgumentParser) -> None:
    """Where the images of a picture are."""
    parser.add_argument(
        "--images", type=str | None, default=None,
        help="Folder or tar file of the embedded images, for a picture, where it has moved.",
    )  # fmt: skip


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("queries", nargs="+", type=str, metavar="IMAGE", help="Images to look for, or folders of such.")
    parser.add_argument("--index", type=str, required=True, metavar="DIR", help="Folder that overlock embed wrote.")
    parser.add_argument("--top", type=int, default=10, help="Number of images to find for each.")
    add_method(parser)
    add_checkpoint(parser)
    add_runtime(parser)
    add_moved(parser)
    add_save(parser, "all that was found", "a contact sheet, each image with what was found for it")
    add_overwrite(parser)


def run(options: Namespace, console: Console) -> int:
    from overlock.deploy.inputs import Failure  # noqa: PLC0415
    from overlock.embeddings.index import open_index  # noqa: PLC0415

    if options.top < 1:
        raise ValueError(f"--top must be at least 1, got {options.top}")
    outputs = Outputs([options.index], overwrite=options.overwrite)
    files = find_files(options.queries, outputs)
    targets = claim_results(options.save, outputs)
    index = open_index(Path(options.index), method_of(options))
    embedder = _load(options, index.embeddings)
    outcomes = list(embedder.stream(files, keep_images=any(targets.values())))
    failures = [one for one in outcomes if isinstance(one, Failure)]
    for failure in failures:
        tell(f"skipped {failure.sentence}")
    queries: list[Any] = [one for one in outcomes if not isinstance(one, Failure)]
    if not queries:
        return 2
    hits = _search(index, queries, options.top)
    rows = _rows(index.embeddings, queries, hits)
    for path, is_picture in targets.items():
        if is_picture:
            _draw(path, index.embeddings, queries, hits, options.images)
        else:
            write_atomically(path, as_csv(rows))
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    else:
        print_rows(console, rows, title=f"among {len(index.embeddings)} images")
        if options.method == "ivf":
            console.print(f"recall@{options.top} of ivf: {100 * index.recall(options.top):.1f} % of an exact search")
    return 1 if failures else 0


def _load(options: Namespace, embeddings: Embeddings) -> Embedder:
    """The network that made the embeddings.

    Raises:
        ValueError: for another one.
    """
    named = options.checkpoint or embeddings.origin.checkpoint
    embedder = load_embedder(named, model=options.model, device=options.device, precision=options.precision)
    if embedder.digest != embeddings.origin.weights:
        raise ValueError(
            f"{named or 'the network of the package'}: these weights are not those that embedded {embeddings.folder} "
            f"({embeddings.origin.model}); name their file with --checkpoint"
        )
    return embedder


def _search(index: Index, queries: Sequence[Embedding], top: int) -> Hits:
    import numpy as np  # noqa: PLC0415

    from overlock.embeddings.shards import normalise  # noqa: PLC0415

    return index.search(normalise(np.stack([query.vector for query in queries])), top)


def _rows(embeddings: Embeddings, queries: Sequence[Embedding], hits: Hits) -> list[Row]:
    """A row for each image that was found."""
    return [
        dict(
            query=query.source, rank=rank, similarity=float(similarity), id=embeddings.ids[place],
            label=embeddings.labels[place] or "",
        )
        for query, places, similarities in zip(queries, *hits, strict=True)
        for rank, (place, similarity) in enumerate(zip(places, similarities, strict=True), start=1)
        if place >= 0
    ]  # fmt: skip


def _draw(path: Path, embeddings: Embeddings, queries: Sequence[Embedding], hits: Hits, root: str | None) -> None:
    from overlock.deploy.picture import encode  # noqa: PLC0415
    from overlock.embeddings.sheets import Tile, draw_sheet, read_small  # noqa: PLC0415
    from overlock.embeddings.sources import open_again  # noqa: PLC0415

    images = open_again(embeddings.origin, root)
    rows = []
    for query, places, similarities in zip(queries, *hits, strict=True):
        tiles = [Tile(query.picture(), ("query", Path(query.source).name))]
        for place, similarity in zip(places, similarities, strict=True):
            if place >= 0:
                image = read_small(images, int(embeddings.places[place]))
                tiles.append(Tile(image, (f"{similarity:.3f}", embeddings.labels[place] or embeddings.ids[place])))
        rows.append(tiles)
    write_atomically(path, encode(draw_sheet(rows), path))


COMMAND = Command("Find the embedded images that are most like some images.", add_options, run)
