"""Whole networks on a GPU beside ConvNeXt: inference, a training step, memory."""

from __future__ import annotations

from collections.abc import Iterator

import models
import torch
from gpu_run import Row, Run

PAIRS = (("overlock_t", "convnext_tiny"), ("overlock_xt", "convnext_nano"))
DRY_PAIRS = (("overlock_atto", "convnext_atto"),)
BATCHES, DRY_BATCHES = (128, 1), (1,)


def _measure(
    run: Run, names: tuple[str, ...], forms: tuple[models.Form, ...], size: tuple[int, ...], *, train: bool = False,
    features: bool = False, backends: tuple[models.BackendName, ...] = ("auto",), repeats: int = 15, trial: bool = True,
) -> Iterator[Row]:  # fmt: skip
    """Rows of some networks, ours fused in inference, by turns; cuDNN chooses by trial or by its own rules."""
    torch.backends.cudnn.benchmark = trial
    torch.compiler.reset()
    images = torch.randn(size, device=run.device, dtype=torch.float32 if train else torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last)
    networks = [
        models.build(
            name, choice, train=train, features=features, fused=True, device=run.device, dtype=torch.bfloat16,
            layout=torch.channels_last,
        )
        for name in names
        for choice in ((("torch",) if run.dry else backends) if name.startswith("overlock") else ("auto",))
    ]  # fmt: skip
    settings = dict(train=train, features=features, dtype=torch.bfloat16)
    yield from models.measure(networks, forms, images, 2 if run.dry else repeats, **settings)


def inference(run: Run) -> Iterator[Row]:
    """Batches as they come and as CUDA graphs first, then compiled, which takes long."""
    side = 32 if run.dry else 224
    for forms in (("eager",), ("compiled",)) if run.dry else (("eager", "graph"), ("compiled", "compiled graph")):
        for pair in DRY_PAIRS if run.dry else PAIRS:
            for batch in DRY_BATCHES if run.dry else BATCHES:
                with run.attempt(f"{pair}, {forms}, batch {batch}"):
                    yield from _measure(run, pair, forms, (batch, 3, side, side))


def training(run: Run) -> Iterator[Row]:
    """A step in autocast at a batch of 128, as it stands and as a CUDA graph, by the portable kernels, and compiled."""
    pair, size = (DRY_PAIRS[0], (2, 3, 32, 32)) if run.dry else (PAIRS[0], (128, 3, 224, 224))
    with run.attempt("training"):
        yield from _measure(run, pair, ("eager",) if run.dry else ("eager", "graph"), size, train=True, repeats=8)
    with run.attempt("training, portable"):
        yield from _measure(run, pair, ("eager",), size, train=True, backends=("torch",), repeats=8)
    with run.attempt("training, compiled"):
        yield from _measure(run, pair, ("compiled",), size, train=True, repeats=8)


def memory(run: Run) -> Iterator[Row]:
    """A training step of features of one image of a detector's size.

    cuDNN does not choose by trial: that takes room of its own, and a minute for its large depthwise convolutions.
    """
    pair, size = (DRY_PAIRS[0], (1, 3, 32, 64)) if run.dry else (PAIRS[0], (1, 3, 800, 1280))
    backends: tuple[models.BackendName, ...] = ("auto", "torch", "unfold")
    with run.attempt("memory"):
        yield from _measure(
            run, pair, ("eager",), size, train=True, features=True, backends=backends, repeats=5, trial=False
        )
