"""``overlock cam IMAGE...``."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command, add_overwrite, add_runtime
from overlock.cli.subjects import (
    Subject,
    add_save,
    as_csv,
    claim_results,
    find_files,
    open_subject,
    print_rows,
    read_images,
)
from overlock.files import Outputs, write_atomically

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from overlock.analysis.activation_maps import Layer

DRAWN, SIDE = 16, 224  # images in the picture, and their long side in it
LAYERS = ("stage1", "stage2", "overview", "stage3", "stage4")


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("images", nargs="+", type=str, metavar="IMAGE", help="Images, or folders of such.")
    parser.add_argument(
        "--checkpoint",
        action="append",
        type=str,
        default=[],
        help="A run's folder, a file of weights, hf-hub:USER/NAME, or a model of timm's; may be given several times, "
        "to stand side by side. The package's own network unless given.",
    )
    parser.add_argument("--model", type=str | None, default=None, help="Model of a checkpoint that does not say.")
    parser.add_argument(
        "--layers",
        type=str,
        nargs="+",
        default=["overview", "stage3", "stage4"],
        help=f"Where to look: {', '.join(LAYERS)}. Only OverLoCK has an overview.",
    )
    parser.add_argument(
        "--target",
        type=str | None,
        default=None,
        help="The class to explain, by its name or number from 0 on; what the network is surest of unless given.",
    )
    parser.add_argument(
        "--method",
        type=str,
        default="gradcam",
        help="gradcam, gradcam_plus, hirescam, layercam, xgradcam, eigencam or eigengradcam.",
    )
    parser.add_argument(
        "--boxes", type=str | None, default=None, help="JSON file in COCO's form, to measure the energy in its boxes."
    )
    parser.add_argument(
        "--curves", action="store_true", help="Measure insertion and deletion too; of classifiers, in 42 images a map."
    )
    parser.add_argument(
        "--image_size", type=int | None, default=None, help="Short side in pixels; the network's own unless given."
    )
    add_runtime(parser)
    add_save(parser, "the scores of each map", f"the maps over up to {DRAWN} images")
    add_overwrite(parser)


def run(options: Namespace, console: Console) -> None:
    from overlock.analysis.activation_maps import METHODS  # noqa: PLC0415
    from overlock.deploy.picture import encode  # noqa: PLC0415

    strange = [name for name in options.layers if name not in LAYERS]
    if strange:
        raise ValueError(f"--layers are {', '.join(LAYERS)}; got {strange[0]!r}")
    if options.method not in METHODS:
        raise ValueError(f"--method must be one of {', '.join(METHODS)}; got {options.method!r}")
    inputs = [*options.checkpoint, *([] if options.boxes is None else [options.boxes])]
    outputs = Outputs(inputs, overwrite=options.overwrite)
    files = find_files(options.images, outputs)
    targets = claim_results(options.save, outputs)
    boxes = None if options.boxes is None else _Boxes(Path(options.boxes))
    rows: list[dict[str, Any]] = []
    pictures: dict[Path, list[Image.Image]] = defaultdict(list)
    for checkpoint in options.checkpoint or [None]:
        subject = open_subject(Namespace(**{**vars(options), "checkpoint": checkpoint}))
        study = _Maps(subject, options)
        for file, image in read_images(files, subject.name):
            for layer, cam, scores in study.of(image, None if boxes is None else boxes.of(file)):
                rows.append(dict(network=subject.name, image=str(file), layer=layer, **scores))
                if len(pictures) < DRAWN or file in pictures:
                    pictures[file].append(_draw(image, cam, subject, rows[-1]))
    for path, is_picture in targets.items():
        content = encode(_join(pictures), path) if is_picture else as_csv(rows)
        write_atomically(path, content)
    if options.json:
        console.print_json(json.dumps(rows))
        return
    print_rows(console, _means(rows), title=f"{options.method}: means of {len(files)} images")


class _Maps:
    """The maps of a network."""

    def __init__(self, subject: Subject, options: Namespace):
        from overlock.analysis.activation_maps import find_layers  # noqa: PLC0415
        from overlock.analysis.backbones import Preparation  # noqa: PLC0415

        self.subject, self.options = subject, options
        layers = find_layers(subject.network, subject.name)
        self.layers: list[Layer] = [layers[name] for name in options.layers if name in layers]
        if not self.layers:
            raise ValueError(f"{subject.name}: it has the layers {', '.join(layers)}; give some of these with --layers")
        if options.curves and subject.record.head is not None:
            raise ValueError(f"--curves is for classifiers; {subject.name} is a {subject.record.name}")
        self.prepare = Preparation(subject.network, subject.record, options.image_size)
        self.label = None if options.target is None else _place(options.target, subject)

    def of(
        self, image: Image.Image, boxes: Sequence[Any] | None
    ) -> list[tuple[str, np.ndarray[Any, Any], dict[str, Any]]]:
        """The layers' names, maps and scores."""
        from torchvision.transforms.functional import to_tensor  # noqa: PLC0415

        from overlock.analysis.activation_maps import activation_map, target_of  # noqa: PLC0415
        from overlock.analysis.map_scores import box_energy, insertion_deletion  # noqa: PLC0415

        subject = self.subject
        found = []
        with subject.cast:
            detects = subject.record.task == "detect"  # and prepares images by itself
            x = (to_tensor(image)[None] if detects else self.prepare(image)).to(subject.device)
            target, label = target_of(subject.network, x, subject.record.task, self.label)
            for layer in self.layers:
                cam = activation_map(subject.network, x, layer, [target], method=self.options.method)[0]
                scores: dict[str, Any] = dict(target=subject.record.classes[label])
                if self.options.boxes is not None:
                    scale = x.shape[3] / image.width, x.shape[2] / image.height
                    own = [_scaled(box, scale) for box in boxes or ()]
                    inside, flat = box_energy(cam, own) if own else (None, None)
                    scores |= dict(energy_in_boxes=inside, area_of_boxes=flat)
                if self.options.curves:
                    insertion, deletion = insertion_deletion(subject.network, x, cam, label)
                    scores |= dict(insertion=insertion, deletion=deletion)
                found.append((layer.name, cam, scores))
        return found


class _Boxes:
    """The boxes of images in a file of COCO's form."""

    def __init__(self, path: Path):
        from overlock.data.formats.common import read_json  # noqa: PLC0415
        from overlock.deploy.coco_results import ImageIds  # noqa: PLC0415

        self.ids = ImageIds(path)
        self.boxes: defaultdict[Any, list[tuple[float, ...]]] = defaultdict(list)
        try:
            for one in read_json(path)["annotations"]:
                left, top, width, height = map(float, one["bbox"])
                self.boxes[one["image_id"]].append((left, top, left + width, top + height))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its annotations are not in COCO's form ({error})") from None

    def of(self, file: Path) -> list[tuple[float, ...]]:
        """Those of an image file; none for one that the annotations do not name."""
        return self.boxes.get(self.ids.of_image(str(file)), [])


def _scaled(box: Sequence[float], scale: tuple[float, float]) -> tuple[float, float, float, float]:
    across, down = scale
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


def _place(target: str, subject: Subject) -> int:
    """The class that a word names."""
    classes = subject.record.classes
    if target in classes:
        return classes.index(target)
    if target.isascii() and target.isdecimal() and int(target) < len(classes):
        return int(target)
    raise ValueError(f"--target {target}: {subject.name} has no such class; it has {', '.join(classes[:8])}, ...")


def _draw(image: Image.Image, cam: np.ndarray[Any, Any], subject: Subject, row: dict[str, Any]) -> Image.Image:
    from overlock.analysis.pictures import caption, fit, overlay  # noqa: PLC0415

    return caption(overlay(fit(image, SIDE), cam, strength=0.55), [subject.name, f"{row['layer']}: {row['target']}"])


def _join(pictures: dict[Path, list[Image.Image]]) -> Image.Image:
    from overlock.analysis.pictures import caption, fit  # noqa: PLC0415
    from overlock.data.files import read_image  # noqa: PLC0415
    from overlock.drawing import join_pictures  # noqa: PLC0415

    return join_pictures(
        [[caption(fit(read_image(file), SIDE), [file.name, ""]), *maps] for file, maps in pictures.items()]
    )


def _means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each network and layer: the means of what is a number, and how often the target was the same."""
    groups: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["network"], row["layer"]].append(row)
    table = []
    for (network, layer), members in groups.items():
        means: dict[str, Any] = dict(network=network, layer=layer, maps=len(members))
        for name in members[0]:
            known = [row[name] for row in members if isinstance(row[name], float)]  # some images have no boxes
            if known:
                means[name] = sum(known) / len(known)
        table.append(means)
    return table


COMMAND = Command(
    "Draw and score class activation maps, of several layers and networks side by side.", add_options, run
)
