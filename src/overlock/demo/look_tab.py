"""The first tab: a photo as the network sees it, first at a glance, then closely."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from overlock.analysis.dynamic_kernels import Replace, compare, other_prior, uniform_prior, zero_prior
from overlock.analysis.kernel_picture import Canvas, size_of
from overlock.analysis.pictures import fit, mark, overlay
from overlock.demo.figures import Figure, as_grid, as_note, as_table
from overlock.demo.network import Network
from overlock.demo.photo_inputs import empty_after, make_gallery, make_upload
from overlock.demo.stock import QUEUE, Stock, told
from overlock.demo.uploads import Photo
from overlock.demo.visit import MIDDLE, OWN, UNIFORM, ZEROS, Point, Seen, Swapped, View

SHOWN, SMALL = 640, 168  # long sides of pictures in pixels
MAPS = dict(
    overview=("Overview first", "What a glance finds of the first class.", "Overview-Net"),
    stage3=("Look closely next", "The same, guided by that glance.", "Focus-Net, stage 3"),
    stage4=("And closer still", "The same, before the answer is given.", "Focus-Net, stage 4"),
)
"""Heading, sentence and name of each layer's map."""
KEEP_LINK = "(query) => { history.replaceState(null, '', query || location.pathname); return query; }"
"""The address of the page becomes a link to the view; a visitor's own photo has none."""
NO_BESIDE = (
    "Another network's map can stand here: start the page with `--beside convnext_tiny.fb_in1k`, whose weights timm "
    "fetches once, or with a file of weights."
)


class LookTab:
    """Lays the tab out and answers its events; what it knows of a visit is in Gradio's states alone.

    Args:
        stock: of the page.
    """

    def __init__(self, stock: Stock):
        self.stock, self.network = stock, stock.network
        self.blocks = self._name_blocks()
        self.seen, self.swapped, self.other = gr.State(None), gr.State(None), gr.State(None)
        self.point = gr.State(MIDDLE)
        self.query = gr.Textbox(visible="hidden", elem_id="query", label="query")
        self._lay_out_photo()
        self._lay_out_maps()
        self._lay_out_kernels()
        self._lay_out_prior()

    def _name_blocks(self) -> list[str]:
        """Of the network, by a look at an image of one colour."""
        side = self.network.prepare.side
        return [mixing.name for mixing in self.network.look(Image.new("RGB", (side, side))).mixings]

    def _lay_out_photo(self) -> None:
        with gr.Row():
            with gr.Column():
                self.gallery = make_gallery(self.stock.photos)
                self.upload = make_upload("Or drop a photo of your own")
            with gr.Column():
                self.photo = _picture("Photo: click anywhere", "the photo, with a cross at the chosen point", "photo")
                self.across = gr.Slider(0, 100, 50, step=1, label="Point, % from the left", elem_id="across")
                self.down = gr.Slider(0, 100, 50, step=1, label="Point, % from the top", elem_id="down")
            with gr.Column():
                self.classes = gr.Label(label=f"Classes by {self.network.name}", elem_id="classes")
                self.note = gr.Markdown(elem_id="note")

    def _lay_out_maps(self) -> None:
        self.maps = {}
        with gr.Row():
            for layer, (heading, told, label) in MAPS.items():
                if layer in self.network.layers:
                    with gr.Column(min_width=200):
                        gr.Markdown(f"## {heading}\n{told}")
                        self.maps[layer] = _picture(label, f"map of {label} over the photo", layer)
            with gr.Column(min_width=200):
                gr.Markdown("## Another network")
                beside = self.stock.beside
                if beside is None:
                    gr.Markdown(NO_BESIDE)
                    return
                gr.Markdown("What it finds of its own first class.")
                self.beside = _picture(beside.name, f"map of {beside.name} over the photo", "beside")
                self.beside_classes = gr.Label(label=f"Classes by {beside.name}", elem_id="beside_classes")

    def _lay_out_kernels(self) -> None:
        gr.Markdown(
            "## Kernels of the point\nContMix makes a kernel for each place, from its affinity to the 7 x 7 regions of "
            "the context. Bright taps weigh most; the frame is what the kernel covers."
        )
        self.affinities = gr.HTML(elem_id="affinities")
        self.block = gr.Radio(self.blocks, value=self.blocks[0], type="index", label="Kernels of", elem_id="block")
        self.kernels = gr.HTML(elem_id="kernels")

    def _lay_out_prior(self) -> None:
        gr.Markdown(
            "## Swap the context prior\nOverview-Net hands its glance on as a context prior. Put another photo's in "
            "its place, and see what the network then makes of this one."
        )
        with gr.Row():
            with gr.Column():
                self.prior = gr.Dropdown(
                    self._priors(), value=OWN, label="Context prior of", elem_id="prior", filterable=False
                )
                self.prior_upload = make_upload("Or of a photo of your own", name="prior_upload")
            with gr.Column():
                self.new_classes = gr.Label(label="Classes with this prior", elem_id="new_classes")
            with gr.Column():
                self.changes = gr.HTML(elem_id="changes")

    def _priors(self, *more: str) -> list[str]:
        return [OWN, ZEROS, UNIFORM, *self.stock.photos, *more]

    def connect(self, page: gr.Blocks) -> None:
        """Answer the events of the page."""
        compute: dict[str, Any] = dict(concurrency_id=QUEUE, concurrency_limit=1, api_visibility="private")
        at_once: dict[str, Any] = dict(concurrency_limit=4, api_visibility="private", show_progress="hidden")
        link: dict[str, Any] = dict(fn=None, inputs=self.query, outputs=self.query, js=KEEP_LINK)
        place = [self.point, self.block]
        drawn = [self.photo, self.affinities, self.kernels, self.across, self.down, self.query]
        drawing: dict[str, Any] = dict(
            fn=self.draw, inputs=[self.seen, self.swapped, *place], outputs=drawn, **at_once
        )  # fmt: skip
        swapping: dict[str, Any] = dict(
            fn=self.swap, inputs=[self.seen, self.prior, self.other],
            outputs=[self.swapped, self.new_classes, self.changes], **compute,
        )  # fmt: skip
        looked = [self.seen, self.classes, self.note, *drawn]
        beside = [] if self.stock.beside is None else [self.beside, self.beside_classes]
        public = compute | dict(api_name="look", api_visibility="public")
        sent = self.upload.upload(self.look_at_upload, [self.upload, *place], looked, **public)
        firsts = [sent, self.gallery.select(self.look_at_chosen, place, looked, **compute)]
        if self.stock.photos:
            firsts.append(page.load(self.restore, None, [*looked, *place, self.prior], **compute))
        for first in firsts:
            first.success(**link)
            first.success(self.draw_maps, self.seen, [*self.maps.values(), *beside], **compute)
            first.success(**swapping).success(**drawing).success(**link)
        for picture in (self.photo, *self.maps.values()):
            picture.select(
                self.point_at, [self.seen, self.swapped, self.block], [self.point, *drawn], **at_once
            ).success(**link)  # fmt: skip
        for slider in (self.across, self.down):
            slider.input(
                self.move_to, [self.seen, self.swapped, self.across, self.down, self.block], [self.point, *drawn],
                trigger_mode="always_last", **at_once,
            ).success(**link)  # fmt: skip
        self.block.input(**drawing).success(**link)
        self.prior.input(**swapping).success(**drawing).success(**link)
        sent_prior = self.prior_upload.upload(
            self.add_prior, self.prior_upload, [self.other, self.prior], **compute
        )  # fmt: skip
        sent_prior.success(**swapping).success(**drawing)
        for upload in (self.upload, self.prior_upload):
            empty_after(upload)

    def look_at_chosen(self, point: Point, block: int, event: gr.SelectData) -> tuple[Any, ...]:
        """One of the page's photos."""
        with told():
            name = list(self.stock.photos)[event.index]
            return self._look(self.stock.read_chosen(name), name, point, block)

    def look_at_upload(self, path: str, point: Point, block: int) -> tuple[Any, ...]:
        """A photo that a visitor sent."""
        with told():
            return self._look(self.stock.read(path), None, point, block)

    def restore(self, request: gr.Request) -> tuple[Any, ...]:
        """The view of the page's address."""
        with told():
            view = View.of_query(request.query_params, self.stock.photos)
            block = min(view.block, len(self.blocks) - 1)
            looked = self._look(self.stock.read_chosen(view.photo), view.photo, view.point, block)
            return *looked, view.point, self.blocks[block], view.prior

    def _look(self, photo: Photo, chosen: str | None, point: Point, block: int) -> tuple[Any, ...]:
        look = self.network.look(photo.image)
        seen = Seen(photo=photo, look=look, chosen=chosen)
        return seen, dict(look.classes), photo.note, *self.draw(seen, None, point, block)

    def warm_up(self) -> None:
        """Look at the first photo, so that no visitor waits for what a process does once: imports, memory, fonts."""
        for name in list(self.stock.photos)[:1]:
            with contextlib.suppress(gr.Error):  # a visitor who chooses it is told
                seen, *_ = self._look(self.stock.read_chosen(name), name, MIDDLE, 0)
                for _ in self.draw_maps(seen):
                    pass

    def draw_maps(self, seen: Seen) -> Iterator[dict[Any, Any]]:
        """The activation maps, one after the other as they come."""
        with told():
            image = fit(seen.photo.image, SHOWN)
            found = self.network.maps(seen.photo.image, self.maps, seen.look.label)
            for picture, cam in zip(self.maps.values(), found, strict=True):
                yield {picture: overlay(image, cam, strength=0.55)}
            beside = self.stock.beside
            if beside is not None:
                look = beside.look(seen.photo.image)
                yield {self.beside_classes: dict(look.classes)}
                cam = next(beside.maps(seen.photo.image, [_last_layer(beside)], look.label))
                yield {self.beside: overlay(image, cam, strength=0.55)}

    def point_at(self, seen: Seen | None, swapped: Swapped | None, block: int, event: gr.SelectData) -> tuple[Any, ...]:
        """The point where a picture was clicked."""
        seen = _there(seen)
        size = fit(seen.photo.image, SHOWN).size
        x, y = (min(max(place / side, 0.0), 1.0) for place, side in zip(event.index, size, strict=True))
        return (x, y), *self.draw(seen, swapped, (x, y), block)

    def move_to(
        self, seen: Seen | None, swapped: Swapped | None, across: float, down: float, block: int
    ) -> tuple[Any, ...]:
        """A point in percent of the photo's width and height."""
        point = across / 100, down / 100
        return point, *self.draw(_there(seen), swapped, point, block)

    def draw(
        self, seen: Seen | None, swapped: Swapped | None, point: Point, block: int
    ) -> tuple[Image.Image, str, str, int, int, str]:
        """What the point's kernels are; from what is known already, so that a click is answered at once."""
        seen = _there(seen)
        image = seen.photo.image
        place = (point[0] * image.width, point[1] * image.height)
        canvas = Canvas(image, place, side=SMALL)
        affinities = as_grid(
            "Affinity to the 7 x 7 regions, mean of the groups",
            [Figure(canvas.affinity(mixing), mixing.name) for mixing in seen.look.mixings],
        )
        kernels = self._draw_block(canvas, seen, block, "its own prior")
        prior = OWN
        if swapped is not None and swapped.of is seen:
            prior = swapped.prior
            kernels += self._draw_block(canvas, swapped, block, f"the prior of {prior}")
        large = fit(image, SHOWN)
        marked = mark(large, (point[0] * large.width, point[1] * large.height))
        query = "" if seen.chosen is None else View(photo=seen.chosen, point=point, block=block, prior=prior).as_query()
        return marked, affinities, kernels, round(100 * point[0]), round(100 * point[1]), query

    def _draw_block(self, canvas: Canvas, of: Seen | Swapped, block: int, prior: str) -> str:
        """The affinity and each group's kernels of a block."""
        mixing = of.look.mixings[block]
        figures = [Figure(canvas.affinity(mixing), "affinity")]
        for kernels in reversed(mixing.kernels):
            drawn = enumerate(canvas.kernels(kernels), start=1)
            figures += [Figure(picture, f"group {i}, {size_of(kernels)}") for i, picture in drawn]
        return as_grid(f"{mixing.name.capitalize()}, with {prior}", figures)

    def swap(
        self, seen: Seen | None, prior: str, other: Photo | None
    ) -> tuple[Swapped | None, dict[str, float] | None, str]:
        """The same photo with another context prior."""
        if seen is None or prior == OWN:
            return None, None, as_note("Choose another prior to see what changes.")
        with told():
            if prior in (ZEROS, UNIFORM):
                replace: Replace = zero_prior if prior == ZEROS else uniform_prior
            else:
                photo = other if other is not None and other.name == prior else self.stock.read_chosen(prior)
                found = self.network.look(photo.image).prior
                assert found is not None  # of an OverLoCK
                replace = other_prior(found)
            look = self.network.look(seen.photo.image, replace=replace)
        rows: list[tuple[str, float, float]] = []
        for before, after in zip(seen.look.mixings, look.mixings, strict=True):
            change = compare(before, after)
            rows.append((before.name, change.kernels, change.affinity))
        table = as_table(f"With the prior of {prior}", ["block", "kernels moved", "affinity changed"], rows)
        note = as_note("Kernels: share of their weight that moved to other taps. Affinity: relative change.")
        return Swapped(of=seen, prior=prior, look=look), dict(look.classes), table + note

    def add_prior(self, path: str) -> tuple[Photo, Any]:
        """Another photo of the visitor's, for its prior."""
        with told():
            photo = self.stock.read(path)
        return photo, gr.Dropdown(choices=self._priors(photo.name), value=photo.name)


def _there(seen: Seen | None) -> Seen:
    if seen is None:
        raise gr.Error("choose a photo first, or send one", print_exception=False)
    return seen


def _last_layer(network: Network) -> str:
    return sorted(name for name in network.layers if name != "overview")[-1]


def _picture(label: str, alt: str, name: str) -> gr.Image:
    return gr.Image(
        label=label, alt_text=alt, format="jpeg", type="filepath", interactive=False, buttons=["fullscreen"],
        elem_id=name,
    )  # fmt: skip
