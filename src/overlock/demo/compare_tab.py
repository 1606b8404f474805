"""The tab that compares two networks on a folder of photos."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from overlock.demo.figures import as_note, as_table
from overlock.demo.network import Network
from overlock.demo.stock import QUEUE, Stock, told
from overlock.demo.uploads import read_photo

MOST = 200  # photos of a folder that a visitor sends
HEAD = ("photo", "first: class", "share", "second: class", "share", "same")
HOW_TO = """## No second network yet

This page was started with one network. Start it with two, to compare them on a folder:

```bash
overlock demo --checkpoint runs/first --beside runs/second
overlock demo --checkpoint runs/first --beside convnext_tiny.fb_in1k --photos FOLDER
```

The second may be any classifier: a run's folder, a file of weights, or a model of timm's, whose weights it fetches."""
Row = tuple[str, str, float, str, float, str]


def lay_out_comparison(stock: Stock) -> None:
    """Both networks' classes of each photo of the page, or of a folder that is sent."""
    if stock.beside is None:
        gr.Markdown(HOW_TO)
        return
    gr.Markdown(f"## Two networks on a folder\nFirst: {stock.network.name}. Second: {stock.beside.name}.")
    with gr.Row():
        folder = gr.File(
            file_count="directory", type="filepath", label=f"Your folder, of up to {MOST} photos", height=140,
            elem_id="folder",
        )  # fmt: skip
        own = gr.Button("Compare on the photos of this page", elem_id="compare", interactive=bool(stock.photos))
    table = gr.HTML(elem_id="comparison")
    file = gr.File(label="The table as CSV", interactive=False, visible=False, elem_id="comparison_csv")

    def compare(paths: Sequence[Path], progress: gr.Progress) -> tuple[str, Any]:
        with told():
            rows, left_out = compare_networks(stock, paths, progress)
        return draw_comparison(rows, left_out), gr.File(value=write_csv(rows, file.GRADIO_CACHE), visible=True)

    def compare_sent(paths: list[str], progress: gr.Progress = gr.Progress()) -> tuple[str, Any]:  # noqa: B008
        return compare([Path(path) for path in paths], progress)

    def compare_own(progress: gr.Progress = gr.Progress()) -> tuple[str, Any]:  # noqa: B008
        return compare(list(stock.photos.values()), progress)

    queued: dict[str, Any] = dict(
        outputs=[table, file], concurrency_id=QUEUE, concurrency_limit=1, api_visibility="private"
    )
    folder.upload(compare_sent, folder, **queued)
    own.click(compare_own, None, **queued)


def compare_networks(stock: Stock, paths: Sequence[Path], progress: gr.Progress) -> tuple[list[Row], list[str]]:
    """A row for each photo, and a sentence for each file that is none.

    Raises:
        ValueError: for too many files, and where none is a photo.
    """
    assert stock.beside is not None  # or there is no such tab
    if len(paths) > MOST:
        raise ValueError(f"the folder has {len(paths)} files; send up to {MOST}")
    rows: list[Row] = []
    left_out = []
    for path in progress.tqdm(list(paths), desc="photos"):
        try:
            photo = read_photo(path, max_pixels=stock.max_pixels)
            first, second = (_best(network, photo.image) for network in (stock.network, stock.beside))
        except ValueError as error:
            left_out.append(str(error))
            continue
        rows.append((photo.name, *first, *second, "yes" if first[0] == second[0] else "no"))
    if not rows:
        raise ValueError(f"no photo could be compared; the first: {left_out[0] if left_out else 'no file was sent'}")
    return rows, left_out


def _best(network: Network, image: Any) -> tuple[str, float]:
    return network.look(image).classes[0]


def draw_comparison(rows: Sequence[Row], left_out: Sequence[str]) -> str:
    """The table, and what is to be said of it."""
    same = sum(row[-1] == "yes" for row in rows)
    title = f"{same} of {len(rows)} photos are given the same class"
    return as_table(title, HEAD, rows) + "".join(as_note(f"Left out: {sentence}.") for sentence in left_out)


def write_csv(rows: Sequence[Row], folder: str) -> str:
    """The table as a file in the folder of what is sent to visitors, which is emptied by and by."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["photo", "first_class", "first_share", "second_class", "second_share", "same"])
    writer.writerows(rows)
    return save_bytes_to_cache(text.getvalue().encode(), "comparison.csv", folder)
