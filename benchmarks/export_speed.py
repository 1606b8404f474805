"""Networks in the same runtimes and precisions, timed in turns: multiply-adds a second, and the ratios of two networks.

    python benchmarks/export_speed.py --networks '[overlock_t,convnext_tiny]' --images '[FOLDER]' --folder x --rounds 0
    python benchmarks/export_speed.py --networks '[overlock_t,convnext_tiny]' --images '[FOLDER]' --folder x

The first line writes the files, which takes minutes; the second times them, and writes those that are missing. Beside
the files stand the networks in PyTorch, channels_last: ours after overlock.fuse, others as they are. Weights are
random, images are noise, one a call, after a rest in which the last runtime's threads fall asleep. Which parts int8
leaves in float depends on the weights, so its share is shown.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from export_parity import load
from models import count_macs
from timing import interleave, middle, ratio, report, say, spread
from torch import nn

import overlock
from overlock.data.files import find_images
from overlock.deploy.benchmark import Contender, open_contender
from overlock.export import ExportedNetwork, Spec, export_network
from overlock.export.quantise import int8_share
from overlock.export.spec import ENDINGS, PRECISIONS, Format, Precision
from overlock.export.timing import REST

Size = tuple[int, int]


def write_files(
    name: str, folder: Path, formats: list[Format], precisions: list[Precision], photos: list[Path], image_size: Size
) -> list[Path]:
    """The files of a network, of which those that are missing are written."""
    pairs = [(form, kind) for form, kind in product(formats, precisions) if kind in PRECISIONS[form]]
    paths = {(form, kind): folder / f"{name}_{kind}{ENDINGS[form]}" for form, kind in pairs}
    if all(path.exists() for path in paths.values()):
        return list(paths.values())
    network, record = load(name)
    for (form, kind), path in paths.items():
        if not path.exists():
            spec = Spec(record=record, format=form, task="classify", image_size=image_size, precision=kind)
            done = export_network(network, spec, path, photos=photos, timed=False)
            say(f"{path}: difference {done.largest_difference:.1e}, kept in float: {done.kept_in_float or 'nothing'}")
    return list(paths.values())


def open_networks(name: str, paths: list[Path], image_size: Size) -> list[Contender]:
    """A network in PyTorch and its files, ready to be timed."""
    ours, *files = (open_contender(str(source), batch=1, image_size=image_size) for source in (name, *paths))
    images = ours.images.contiguous(memory_format=torch.channels_last)
    module: nn.Module = ours.module
    if name not in overlock.VARIANTS:  # whose fused form has its own layouts
        module = module.to(memory_format=torch.channels_last)
    return [replace(ours, images=images, module=module), *files]


def int8_percent(one: Contender) -> float | str:
    """The share of the multiply-adds; of other precisions nothing."""
    module = one.module
    if not isinstance(module, ExportedNetwork) or one.precision != "int8":
        return ""
    return 100 * int8_share(module.path, module.spec)


def make_row(
    name: str, one: Contender, taken: list[float], last: list[float], macs: tuple[int, int]
) -> dict[str, object]:
    """Of a network in a runtime; multiply-adds are its own and those of the last network."""
    return {
        "model": name,
        "runtime": one.runtime,
        "precision": one.precision,
        "ms": middle(taken),
        "spread, %": spread(taken),
        "GMAC": macs[0] / 1e9,
        "GMAC/s": macs[0] / 1e6 / middle(taken),
        "over last model": macs[0] / macs[1] * ratio(last, taken),
        "in int8, %": int8_percent(one),
    }


def main(
    networks: list[str],
    images: list[str],
    folder: Path,
    formats: list[Format] = ["onnx", "openvino"],  # noqa: B006 - shown by --help
    precisions: list[Precision] = ["fp32", "int8"],  # noqa: B006
    image_size: Size = (224, 224),
    rounds: int = 30,
    csv: Path | None = None,
) -> None:
    """Export networks where that is still to be done, time all and print medians.

    Args:
        networks: names that timm knows; rates are compared with the last one's, round by round.
        images: photographs, or folders of them, that files are compared with PyTorch on, and int8 is calibrated on.
        folder: of the files.
        formats: of the files.
        precisions: of the files, as far as a format has them.
        image_size: height and width.
        rounds: in each, every network has one turn; 0 to write the files alone.
        csv: file for the table.
    """
    photos = find_images(images)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: write_files(name, folder, formats, precisions, photos, image_size) for name in networks}
    if rounds == 0:
        return
    opened = {name: open_networks(name, paths[name], image_size) for name in networks}
    places = range(len(opened[networks[0]]))
    turns = [(name, i) for i in places for name in networks]  # those that are compared are neighbours
    ready = {turn: opened[turn[0]][turn[1]] for turn in turns}
    with torch.inference_mode():
        taken = interleave(
            {str(turn): functools.partial(one.module, one.images) for turn, one in ready.items()},
            repeats=rounds, rest=REST,
        )  # fmt: skip
    macs = {name: count_macs(name, image_size, features=False) for name in networks}
    last = networks[-1]
    rows = [
        make_row(name, one, taken[str((name, i))], taken[str((last, i))], (macs[name], macs[last]))
        for (name, i), one in ready.items()
    ]
    report(f"An image of {' x '.join(map(str, image_size))}, classification", rows, csv)


if __name__ == "__main__":
    from jsonargparse import auto_cli  # here, so that others need not have it

    auto_cli(main, as_positional=False)
