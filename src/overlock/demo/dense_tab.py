"""The tabs for detection and segmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from PIL import Image

from overlock.demo.figures import as_note, as_table
from overlock.demo.photo_inputs import make_gallery, make_upload
from overlock.demo.stock import QUEUE, Stock, told
from overlock.demo.uploads import Photo
from overlock.deploy import Detector, Segmenter

HOW_TO = """## No {noun} yet

This page was started without one. Train one from your own {data}, and start the page with it:

```bash
pip install 'overlock[train,{task}]'
overlock train small_{task} --data FOLDER --output runs/{task}
overlock demo --{noun} runs/{task}
```

The forms of data are in docs/detection_segmentation.md. The authors' files of weights can be given as well."""
Answer = tuple[Image.Image, str]
"""A picture, and a table below it."""


def lay_out_detection(stock: Stock) -> None:
    """Objects of a photo, from a score on."""
    detector = stock.detector
    if detector is None:
        gr.Markdown(HOW_TO.format(noun="detector", task="detect", data="images with boxes or masks"))
        return
    gr.Markdown(f"## Detection\n{detector.record.name}: {_listed(detector.record.classes)}")
    threshold = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="Least score of an object", elem_id="threshold")
    _lay_out(stock, "detect", lambda photo, least: find_objects(detector, photo, least), threshold)


def lay_out_segmentation(stock: Stock) -> None:
    """The class of each pixel of a photo."""
    segmenter = stock.segmenter
    if segmenter is None:
        gr.Markdown(HOW_TO.format(noun="segmenter", task="segment", data="images with label maps or masks"))
        return
    gr.Markdown(f"## Segmentation\n{segmenter.record.name}: {_listed(segmenter.record.classes)}")
    _lay_out(stock, "segment", lambda photo: label_pixels(segmenter, photo))


def _lay_out(stock: Stock, task: str, answer: Callable[..., Answer], *settings: gr.Slider) -> None:
    """Photos to choose or send, and the answer beside; settings answer anew."""
    kept = gr.State(None)
    with gr.Row():
        with gr.Column():
            gallery = make_gallery(stock.photos, name=f"{task}_photos")
            upload = make_upload("Or drop a photo of your own", name=f"{task}_upload")
        with gr.Column(scale=2):
            picture = gr.Image(
                label="Result", alt_text="the photo with what was found", format="jpeg", interactive=False,
                buttons=["fullscreen"], elem_id=f"{task}_picture",
            )  # fmt: skip
            table = gr.HTML(elem_id=f"{task}_table")

    def choose(event: gr.SelectData) -> Photo:
        with told():
            return stock.read_chosen(list(stock.photos)[event.index])

    def send(path: str) -> Photo:
        with told():
            return stock.read(path)

    def show(photo: Photo | None, *values: float) -> Answer:
        if photo is None:
            raise gr.Error("choose a photo, or send one", print_exception=False)
        with told():
            return answer(photo, *values)

    queued: dict[str, Any] = dict(concurrency_id=QUEUE, concurrency_limit=1, api_visibility="private")
    shown: dict[str, Any] = dict(fn=show, inputs=[kept, *settings], outputs=[picture, table], **queued)
    gallery.select(choose, None, kept, **queued).success(**shown)
    upload.upload(send, upload, kept, **queued).success(**shown)
    for setting in settings:
        setting.release(**shown)


def find_objects(detector: Detector, photo: Photo, threshold: float) -> Answer:
    """The photo with its objects, and their table."""
    found = detector(photo.image, threshold=threshold)
    if not found.boxes:
        return photo.image, as_note(f"No object has a score of {threshold:g} or more; lower it, or take another photo.")
    rows = [
        (label, score, ", ".join(f"{side:.0f}" for side in box))
        for label, score, box in zip(found.labels, found.scores, found.boxes, strict=True)
    ]
    return found.draw(), as_table(f"{len(rows)} objects", ["class", "score", "left, top, right, bottom"], rows)


def label_pixels(segmenter: Segmenter, photo: Photo) -> Answer:
    """The photo in the colours of its pixels' classes, and their shares."""
    found = segmenter(photo.image)
    return found.draw(), as_table("Share of the pixels", ["class", "share"], found.shares().items())


def _listed(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
