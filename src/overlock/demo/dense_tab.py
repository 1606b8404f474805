"""The tabs for detection and segmentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import gradio as gr
from PIL import Image

from overlock.demo.figures import Swatch, as_note, as_table
from overlock.demo.photo_inputs import empty_after, make_gallery, make_upload
from overlock.demo.stock import QUEUE, Stock, told
from overlock.demo.uploads import Photo
from overlock.deploy import LabelMap, Objects
from overlock.drawing import colour_of
from overlock.ops import backend

HOW_TO = """## No {noun} yet

This page was started without one. Train one from your own {data}, and start the page with it:

```bash
pip install 'overlock[train,{task}]'
overlock train small_{task} --data FOLDER --output runs/{task}
overlock demo --{noun} runs/{task}
```

The forms of data are in docs/detection_segmentation.md. The authors' files of weights can be given as well."""
LEAST = 0.05
"""Score of the objects that are kept of a photo, of which the slider shows those of a higher one."""
Found = TypeVar("Found", Objects, LabelMap)
Answer = tuple[Image.Image, str]
"""A picture, and a table below it."""


def lay_out_detection(stock: Stock) -> None:
    """Objects of a photo, from a score on."""
    detector = stock.detector
    if detector is None:
        gr.Markdown(HOW_TO.format(noun="detector", task="detect", data="images with boxes or masks"))
        return
    gr.Markdown(f"## Detection\n{detector.record.name}: {_listed(detector.record.classes)}")
    threshold = gr.Slider(LEAST, 0.95, 0.5, step=0.05, label="Least score of an object", elem_id="threshold")
    _lay_out(stock, "detect", lambda image: detector(image, threshold=LEAST), show_objects, threshold)


def lay_out_segmentation(stock: Stock) -> None:
    """The class of each pixel of a photo."""
    segmenter = stock.segmenter
    if segmenter is None:
        gr.Markdown(HOW_TO.format(noun="segmenter", task="segment", data="images with label maps or masks"))
        return
    gr.Markdown(f"## Segmentation\n{segmenter.record.name}: {_listed(segmenter.record.classes)}")
    _lay_out(stock, "segment", segmenter, show_labels)


def _lay_out(
    stock: Stock, task: str, find: Callable[[Image.Image], Found], show: Callable[..., Answer], *settings: gr.Slider
) -> None:
    """Photos to choose or send, and what is found beside; settings show it anew."""
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

    def look_at(photo: Photo) -> tuple[Photo, Found]:
        with backend("torch"):  # no visitor waits until kernels are compiled
            return photo, find(photo.image)

    def choose(event: gr.SelectData) -> tuple[Photo, Found]:
        with told():
            return look_at(stock.read_chosen(list(stock.photos)[event.index]))

    def send(path: str) -> tuple[Photo, Found]:
        with told():
            return look_at(stock.read(path))

    def answer(seen: tuple[Photo, Found] | None, *values: float) -> Answer:
        if seen is None:
            raise gr.Error("choose a photo, or send one", print_exception=False)
        photo, found = seen
        shown, text = show(found, *values)
        return shown, (as_note(photo.note) if photo.note else "") + text

    queued: dict[str, Any] = dict(
        outputs=kept, concurrency_id=QUEUE, concurrency_limit=1, api_visibility="private", show_progress_on=picture
    )
    at_once: dict[str, Any] = dict(
        fn=answer, inputs=[kept, *settings], outputs=[picture, table], concurrency_limit=4, api_visibility="private",
        show_progress="hidden",
    )  # fmt: skip
    gallery.select(choose, None, **queued).success(**at_once)
    upload.upload(send, upload, **queued).success(**at_once)
    empty_after(upload)
    for setting in settings:
        setting.input(trigger_mode="always_last", **at_once)


def show_objects(found: Objects, threshold: float) -> Answer:
    """The photo with its objects from a score on, and their table."""
    count = sum(score >= threshold for score in found.scores)
    if not count:
        note = as_note(f"No object has a score of {threshold:g} or more; lower it, or take another photo.")
        return found.picture(), note
    masks = None if found.masks is None else found.masks[:count]
    surest = replace(
        found, class_ids=found.class_ids[:count], scores=found.scores[:count], boxes=found.boxes[:count], masks=masks
    )
    rows = [
        (Swatch(found.classes[label], colour_of(label)), score, ", ".join(f"{side:.0f}" for side in box))
        for label, score, box in zip(surest.class_ids, surest.scores, surest.boxes, strict=True)
    ]
    title = "1 object" if count == 1 else f"{count} objects"
    return surest.draw(), as_table(title, ["class", "score", "left, top, right, bottom"], rows)


def show_labels(found: LabelMap) -> Answer:
    """The photo in the colours of its pixels' classes, and their shares."""
    rows = [(Swatch(name, colour_of(found.classes.index(name))), share) for name, share in found.shares().items()]
    return found.draw(legend=False), as_table("Share of the pixels", ["class", "share"], rows)


def _listed(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
