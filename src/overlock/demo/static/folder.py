"""The folder of the static page: its files, both graphs, photos, and what the page is told of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from overlock.analysis.dynamic_kernels import Mixing
from overlock.checkpoints import Record
from overlock.demo.static.graphs import FOCUS, OVERVIEW, check_graphs, write_graphs
from overlock.demo.static.web_runtime import MODULE, VERSION, unpack_runtime
from overlock.demo.uploads import ASPECT, read_photo
from overlock.export.graphs import normalisation
from overlock.export.parity import PHOTO
from overlock.files import write_atomically
from overlock.network import OverLoCK

FILES = Path(__file__).parent / "files"
SIDE = 640  # longest of a photo of the page, in pixels
MOST = 50  # photos of a page


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of a visitor's photo."""

    megabytes: int
    pixels: int


def check_network(network: nn.Module, record: Record, name: str) -> OverLoCK:
    """A network that the page can show.

    Raises:
        ValueError: for another one.
    """
    if not isinstance(network, OverLoCK) or record.task != "classify" or record.channels != 3:
        raise ValueError(f"{name} is a {record.name}; --export takes an OverLoCK classifier of photos in colour")
    if network.head.global_pool.pool_type != "avg" or not network.num_classes:
        raise ValueError(f"{name}: --export takes a classifier with average pooling, whose features make class maps")
    return network.eval()


def write_page(
    network: OverLoCK, record: Record, folder: Path, *, name: str, photos: Mapping[str, Path], archive: Path,
    limits: Limits,
) -> float:  # fmt: skip
    """Write the page.

    Args:
        network: of :func:`check_network`.
        record: of it.
        folder: that is there.
        name: of the network, for the page.
        photos: to choose from, by name; a photograph of the package where there are none.
        archive: of :func:`overlock.demo.static.web_runtime.find_archive`.
        limits: of what visitors drop.

    Returns:
        The largest difference of the graphs from PyTorch, over the largest number of an output, on all photos.

    Raises:
        ValueError: where there are too many photos, one cannot be read, a file cannot be written, or the graphs differ
            from PyTorch.
        ImportError: without the packages that write and run ONNX.
    """
    if len(photos) > MOST:
        raise ValueError(f"--photos has {len(photos)} photos; give a folder of at most {MOST}, all of which are shown")
    photos = photos or {"cat.jpg": PHOTO}
    images = {title: _shrink(read_photo(path, max_pixels=limits.pixels).image) for title, path in photos.items()}
    side = int(record.preprocessing["input_size"][1])
    prepared = [prepare(image, record, side) for image in images.values()]
    write_graphs(network, prepared[0], folder)
    difference, mixings = check_graphs(network, prepared, folder)
    unpack_runtime(archive, folder / "runtime")
    for file in sorted(FILES.iterdir()):
        target = folder / "runtime" if file.name == "LICENSE.txt" else folder
        shutil.copyfile(file, target / file.name)
    (folder / "photos").mkdir(exist_ok=True)
    listed = []
    for i, (title, image) in enumerate(images.items(), start=1):
        image.save(folder / "photos" / f"{i}.jpg", quality=88)
        listed.append(dict(name=title, file=f"photos/{i}.jpg"))
    mean, std = normalisation(record)
    about = dict(
        name=name, classes=record.classes, side=side, mean=mean, std=std,
        has_class_overview=network.aux_head is not None, blocks=list(_describe(mixings)), photos=listed,
        limits=dict(megabytes=limits.megabytes, pixels=limits.pixels, aspect=ASPECT),
        bytes={file: (folder / file).stat().st_size for file in (OVERVIEW, FOCUS, f"runtime/{MODULE}")},
        runtime=VERSION,
    )  # fmt: skip
    write_atomically(folder / "page.json", json.dumps(about, ensure_ascii=False, indent=1))
    return difference


def prepare(image: Image.Image, record: Record, side: int) -> Tensor:
    """The middle square of a photo as the graphs take it, (1, 3, S, S)."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    square = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))
    mean, std = (_column(numbers) for numbers in normalisation(record))
    return ((pil_to_tensor(square) / 255 - mean) / std)[None]


def _column(numbers: Sequence[float]) -> Tensor:
    return Tensor(numbers).view(-1, 1, 1)


def _shrink(image: Image.Image) -> Image.Image:
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def _describe(mixings: Sequence[Mixing]) -> Iterator[dict[str, Any]]:
    """What the page is to know of each block's outputs."""
    for mixing in mixings:
        _, groups, rows, columns, regions, _ = mixing.affinity.shape
        sizes = [kernels.taps.shape[-1] for kernels in mixing.kernels]
        yield dict(name=mixing.name, groups=groups, rows=rows, columns=columns, regions=regions, sizes=sizes)
