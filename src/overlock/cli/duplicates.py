"""``overlock duplicates DIR``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command, add_overwrite
from overlock.cli.search import add_method, add_moved, method_of
from overlock.cli.subjects import add_save, as_csv, claim_results, print_rows
from overlock.files import Outputs, write_atomically

if TYPE_CHECKING:
    from overlock.embeddings.duplicates import Group
    from overlock.embeddings.shards import Embeddings

SHOWN = 20  # groups in the table at the terminal
WIDTH = 8  # images of a group on the contact sheet


def add_threshold(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--threshold", type=float, default=0.99, help="Cosine above which two images are near-duplicates."
    )


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("index", type=str, metavar="DIR", help="Folder that overlock embed wrote.")
    add_threshold(parser)
    add_method(parser)
    add_moved(parser)
    add_save(parser, "the images of all groups, a row each", "a contact sheet, a group in each row")
    add_overwrite(parser)


def run(options: Namespace, console: Console) -> None:
    from overlock.embeddings.duplicates import check_threshold, find_duplicates  # noqa: PLC0415
    from overlock.embeddings.index import open_index  # noqa: PLC0415

    check_threshold(options.threshold)
    targets = claim_results(options.save, Outputs([options.index], overwrite=options.overwrite))
    index = open_index(Path(options.index), method_of(options))
    embeddings = index.embeddings
    ids, labels = embeddings.ids, embeddings.labels
    groups = find_duplicates(index, options.threshold)
    for path, is_picture in targets.items():
        if is_picture:
            _draw(path, embeddings, groups, options.images)
        else:
            rows = [
                dict(group=number, similarity=group.similarity, id=ids[place], label=labels[place])
                for number, group in enumerate(groups, start=1)
                for place in group.places
            ]
            write_atomically(path, as_csv(rows) if rows else "group,similarity,id,label\n")
    if options.json:
        found = [dict(similarity=group.similarity, ids=[ids[i] for i in group.places]) for group in groups]
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        return
    if groups:
        shown = [
            dict(group=i, images=len(group.places), similarity=group.similarity, first=_names(embeddings, group))
            for i, group in enumerate(groups[:SHOWN], start=1)
        ]
        print_rows(console, shown, title=f"the largest of {len(groups)} groups")
    spare = sum(len(group.places) - 1 for group in groups)
    console.print(f"{len(groups)} groups of near-duplicates; {spare} of {len(embeddings)} images beside a first one")


def _names(embeddings: Embeddings, group: Group) -> str:
    more = ", ..." if len(group.places) > 3 else ""
    return ", ".join(embeddings.ids[place] for place in group.places[:3]) + more


def _draw(path: Path, embeddings: Embeddings, groups: Sequence[Group], root: str | None) -> None:
    from overlock.deploy.picture import encode  # noqa: PLC0415
    from overlock.embeddings.sheets import ROWS, Tile, draw_sheet, read_small  # noqa: PLC0415
    from overlock.embeddings.sources import open_again  # noqa: PLC0415

    if not groups:
        raise ValueError(f"{path}: there are no near-duplicates to draw; leave --save out, or lower --threshold")
    images = open_again(embeddings.origin, root)
    rows = [
        [
            Tile(
                read_small(images, int(embeddings.places[place])),
                (f"group {number}", embeddings.labels[place] or embeddings.ids[place]),
            )
            for place in group.places[:WIDTH]
        ]
        for number, group in enumerate(groups[:ROWS], start=1)
    ]
    write_atomically(path, encode(draw_sheet(rows), path))


COMMAND = Command("Group embedded images that are near-duplicates of each other.", add_options, run)
