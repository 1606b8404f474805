"""The losses of a training run on CPU by our kernels and by plain PyTorch, step by step.

    python benchmarks/losses.py CIFAR10_FOLDER/train.npz [--steps 50] [--csv FILE]

Each precision's runs start from the same weights and see the same images in the same order. Only the backend of the
operators differs: ``auto`` takes the kernels, ``torch`` PyTorch's own operations.
In bfloat16 the two forms round at different places; so each is held against the float32 losses as well.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timing import report
from torch import Tensor
from torch.nn import functional as F

import overlock  # noqa: F401
from overlock.ops import backend

FORMS = {"kernels": "auto", "plain": "torch"}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_batches(file: Path, *, steps: int, batch_size: int, image_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, S, S) and classes (B), drawn from a packed file of JPEG images: ``jpeg``, ``offsets``, ``labels``.

    Args:
        file: of the images.
        steps: how many batches.
        batch_size: B.
        image_size: S, to which they are enlarged.
    """
    packed = np.load(file)
    jpeg, offsets, labels = packed["jpeg"], packed["offsets"], packed["labels"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: steps * batch_size]
    for chosen in order.view(steps, batch_size).tolist():
        pictures = [Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB") for i in chosen]
        images = torch.stack([torch.from_numpy(np.array(x.resize((image_size, image_size)))) for x in pictures])
        yield images.permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(labels[chosen].astype(np.int64))


def train(
    model: str, batches: Sequence[tuple[Tensor, Tensor]], form: str, dtype: torch.dtype, lr: float = 1e-4
) -> list[float]:
    """The loss of each step.

    Args:
        model: timm's name.
        batches: of each step, images and classes.
        form: the backend of the operators, forward and backward.
        dtype: float32, or bfloat16 by autocast.
        lr: AdamW's learning rate.
    """
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=10, drop_path_rate=0.0).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    losses = []
    for images, classes in batches:
        x = images.to(memory_format=torch.channels_last)
        with backend(form), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(network(x).float(), classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def compare(model: str, batches: Sequence[tuple[Tensor, Tensor]], lr: float) -> dict[str, list[float]]:
    """The losses of each form in each precision, by names such as "bfloat16, kernels"."""
    return {
        f"{precision}, {form}": train(model, batches, name, dtype, lr)
        for precision, dtype in PRECISIONS.items()
        for form, name in FORMS.items()
    }


def differences(losses: dict[str, list[float]]) -> list[dict[str, object]]:
    """Largest ones of the pairs that are to agree, over the steps."""
    pairs = [(f"{precision}, kernels", f"{precision}, plain") for precision in PRECISIONS]
    pairs += [(f"bfloat16, {form}", "float32, plain") for form in FORMS]
    rows: list[dict[str, object]] = []
    for one, other in pairs:
        ours, theirs = (torch.tensor(losses[name], dtype=torch.float64) for name in (one, other))
        apart = (ours - theirs).abs()
        rows.append(
            {
                "losses": one, "beside": other, "largest difference": float(apart.max()),
                "relative": float((apart / theirs).max()), "mean difference": float(apart.mean()),
                "at the step": int(apart.argmax()) + 1, "last loss": losses[one][-1],
            }
        )  # fmt: skip
    return rows


def main(
    images: Path, model: str = "overlock_atto", steps: int = 50, batch_size: int = 16, image_size: int = 64,
    lr: float = 1e-4, csv: str | None = None,
) -> None:  # fmt: skip
    """Train four times and compare.

    Args:
        images: packed file of JPEG images.
        model: timm's name.
        steps: of each run.
        batch_size: images a step.
        image_size: their side.
        lr: AdamW's learning rate.
        csv: file for the losses of all steps.
    """
    batches = list(load_batches(images, steps=steps, batch_size=batch_size, image_size=image_size))
    losses = compare(model, batches, lr)
    report(f"{model}, {batch_size} x {image_size} x {image_size}, {steps} steps", differences(losses), None)
    if csv:
        from timing import write_csv  # noqa: PLC0415

        write_csv([{"step": i + 1, **{n: x[i] for n, x in losses.items()}} for i in range(steps)], csv)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
