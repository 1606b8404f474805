"""From a trained network to a checked file: traced, written, opened again, compared and timed."""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from overlock.export.find import with_preparation
from overlock.export.graphs import Entry, make_entry, smallest_image, trace
from overlock.export.parity import PHOTO, Agreement, compare, make_images
from overlock.export.quantise import int8_share, quantise
from overlock.export.runtimes import ExportedNetwork
from overlock.export.spec import Spec
from overlock.export.timing import interleave
from overlock.export.write import Writing, write
from overlock.fused.fuse import fuse

ROUNDS = 5  # of its timing


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of an export."""

    spec: Spec
    agreements: list[Agreement]
    seconds: Mapping[str, float]
    """An image through the file, and through ``overlock.fuse``, in turns; empty where they were not timed."""
    kept_in_float: list[str]
    """Of int8 the groups of operations that are not."""
    int8_share: float | None
    """Of int8 the share of the multiply-adds that are."""

    @property
    def largest_difference(self) -> float:
        return max(one.difference for one in self.agreements)


def export_network(
    network: nn.Module,
    spec: Spec,
    path: str | os.PathLike[str],
    *,
    photos: Sequence[Path] = (PHOTO,),
    timed: bool = True,
) -> Report:
    """Write a network as a file for another runtime, once it is known to compute the same.

    Args:
        network: in evaluation mode, as :func:`overlock.checkpoints.load_model` gives it; it stays as it is.
        spec: of the file.
        path: with the ending of the format.
        photos: files of images that both are compared on, and int8 is calibrated on.
        timed: time both too.

    Raises:
        ValueError: for a network that cannot be exported so, a file that differs from it or cannot be written; then no
            file is left.
        ImportError: without the package of the format.
    """
    path = Path(path)
    if not path.name.endswith(spec.file_ending):
        raise ValueError(f"{path}: the name of a file of the format {spec.format} must end in {spec.file_ending}")
    if spec.record.task == "detect":
        spec = replace(spec, record=with_preparation(network, spec.record))
    entry = make_entry(network, spec)
    if "size" in spec.dynamic:
        spec = replace(spec, smallest_image=smallest_image(entry))
    as_trained = Entry(network, spec.record, spec.task, with_preprocessing=spec.with_preprocessing).eval()
    kept: list[str] = []
    with Writing(path) as target:
        program = trace(entry, spec)
        if spec.precision == "int8":
            source = target.with_name(f"float{spec.file_ending}")
            write(program, replace(spec, precision="fp32"), source)
            kept = quantise(source, target, spec, [make_images(spec, [photo], 1, spec.image_size) for photo in photos])
            for part in source.parent.glob("float.*"):
                part.unlink()
        else:
            write(program, spec, target)
        exported = ExportedNetwork(target)
        agreements = compare(as_trained, exported, photos)
        share = int8_share(target, spec) if spec.precision == "int8" else None
    seconds: Mapping[str, float] = {}
    if timed:
        fused = Entry(fuse(network), spec.record, spec.task, with_preprocessing=spec.with_preprocessing).eval()
        images = make_images(spec, photos, 1, spec.image_size)
        of_file, of_fused = interleave([functools.partial(call, images) for call in (exported.run, fused)], ROUNDS)
        seconds = {"file": statistics.median(of_file), "overlock.fuse": statistics.median(of_fused)}
    return Report(spec=spec, agreements=agreements, seconds=seconds, kept_in_float=kept, int8_share=share)
