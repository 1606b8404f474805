"""How far exported files are from PyTorch on photographs: tables of differences, sizes and seconds (docs/export.md).

    python benchmarks/export_parity.py --networks '[overlock_xt]' --tasks '[classify,features]' --images '[PHOTO,...]'
    python benchmarks/export_parity.py --networks '[runs/cells]' --tasks '[detect]' --images '[bccd/test]'

Of a name of timm's, all parameters and statistics have random values, so that none is left out as a zero. A network is
traced once for each task, and each format written from that, opened by its runtime and compared. What the CSV already
has is not done again. Seconds are of the processor.
"""

from __future__ import annotations

import csv
import functools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import machine, say
from torch import nn

from overlock.checkpoints import Record
from overlock.data.files import find_images
from overlock.deploy.models import is_file, load_network, load_untrained
from overlock.export import ExportedNetwork, Spec
from overlock.export.find import with_preparation
from overlock.export.graphs import Entry, make_entry, smallest_image, trace
from overlock.export.parity import compare
from overlock.export.write import write

COLUMNS = (
    "network", "task", "format", "batch", "height", "width", "output", "difference",
    "mb", "trace_s", "write_s", "open_s",
)  # fmt: skip
SHAKE = 0.1


def load(source: str) -> tuple[nn.Module, Record]:
    """A trained network, or by its name one whose parameters and statistics are all random."""
    if is_file(source):
        return load_network(source)
    network, record = load_untrained(source)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                scale = float(tensor.std()) if tensor.dim() > 1 else 0.0
                tensor.add_((scale or SHAKE) * torch.randn(tensor.shape, generator=generator))
    return network, record


def seconds_of(work: Any) -> tuple[Any, float]:
    """What a call gives, and its seconds of the processor."""
    started = time.process_time()
    return work(), round(time.process_time() - started, 1)


def measure(
    network: nn.Module, spec: Spec, formats: list[str], photos: list[Path], known: set[tuple[str, ...]], name: str
) -> Any:
    """Rows of a network and task, format by format."""
    missing = [form for form in formats if (name, spec.task, form) not in known]
    if not missing:
        return
    entry = make_entry(network, spec)
    spec = replace(spec, smallest_image=smallest_image(entry) if "size" in spec.dynamic else 1)
    program, tracing = seconds_of(functools.partial(trace, entry, spec))
    as_trained = Entry(network, spec.record, spec.task).eval()
    for form in missing:
        own: Any = replace(spec, format=form)
        if spec.task == "detect" and form != missing[0]:  # whose program can be decomposed once only
            program, tracing = seconds_of(functools.partial(trace, entry, spec))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"network{own.file_ending}"
            _, writing = seconds_of(functools.partial(write, program, own, path))
            exported, opening = seconds_of(functools.partial(ExportedNetwork, path))
            size = sum(part.stat().st_size for part in Path(folder).iterdir()) / 1e6
            for one in compare(as_trained, exported, photos):
                batch, _, height, width = one.shape
                values = (name, spec.task, form, batch, height, width, one.output, f"{one.difference:.1e}")
                yield dict(zip(COLUMNS, (*values, f"{size:.1f}", tracing, writing, opening), strict=True))


def main(
    networks: list[str],
    images: list[str],
    tasks: list[str],
    formats: list[str] = ["torch-export", "onnx", "openvino"],  # noqa: B006 - shown by --help
    image_size: tuple[int, int] = (224, 224),
    dynamic: list[str] = ["batch", "size"],  # noqa: B006
    csv_file: str = "export_parity.csv",
) -> None:
    """Export networks in all formats and compare each file with PyTorch.

    Args:
        networks: names that timm knows, runs' folders or files of weights.
        images: photographs, or folders of them, that files are compared on.
        tasks: of the files: classify, features, detect or segment.
        formats: of the files.
        image_size: height and width that the network is traced near.
        dynamic: what is free: batch, size, or nothing. Detectors take one image in any case.
        csv_file: table, which is added to.
    """
    photos, table = find_images(images), Path(csv_file)
    rows = list(csv.DictReader(table.open(newline=""))) if table.exists() else []
    known = {(row["network"], row["task"], row["format"]) for row in rows}
    for name in networks:
        network, record = load(name)
        record = with_preparation(network, record) if record.task == "detect" else record
        for task in tasks:
            free = tuple(axis for axis in dynamic if (axis, task) != ("batch", "detect"))
            spec = Spec(record=record, format="onnx", task=task, image_size=image_size, dynamic=free)  # type: ignore[arg-type]
            for row in measure(network, spec, formats, photos, known, name):
                say("  ".join(map(str, row.values())))
                with table.open("a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    if file.tell() == 0:
                        writer.writeheader()
                    writer.writerow(row)
    say(machine())


if __name__ == "__main__":
    from jsonargparse import auto_cli  # here, so that others need not have it

    auto_cli(main, as_positional=False)
