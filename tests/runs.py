"""Small training runs for the tests: seconds long, with every random part of the recipe switched on."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from helpers import FEWEST
from pictures import make_classes
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from overlock.training import RunConfig, TrainConfig
from overlock.training.run import train

STEPS = 4  # of an epoch of the images below: 24, a fifth of each class held out, in batches of 4


def make_images(folder: Path, count: int = 8) -> Path:
    """Three classes of images."""
    return make_classes(folder, count)


def settings(data: Path, output: Path, **changes: Any) -> TrainConfig:
    """Two epochs of all that is random; groups of settings are given as dicts. A model that is named is whole."""
    base: dict[str, Any] = dict(
        data=str(data),
        output=str(output),
        model="overlock_atto",
        model_args={} if "model" in changes else FEWEST,
        image_size=32,
        epochs=2,
        batch_size=4,
        drop_path=0.2,
        augment=dict(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.5),
        loss=dict(mixup=0.8, cutmix=1.0),
        optim=dict(lr=1e-3, base_batch_size=4, warmup_epochs=0.5),
        ema=dict(decay=0.8),
        runtime=dict(accelerator="cpu", workers=0),
        safety=dict(steps=2),
    )
    for name, value in changes.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return TrainConfig.from_dict(base)


def run(config: RunConfig, *, curves: bool = False, **options: Any) -> str:
    """Train and return what was printed; the curves take longer to draw than the run has for its steps."""
    lines = io.StringIO()
    with nullcontext() if curves else patch("overlock.training.reports.draw_curves"):
        train(config, console=Console(file=lines, width=400), **options)
    return lines.getvalue()


def final_state(folder: Path) -> dict[str, Tensor]:
    """All that a run ends with: weights, moments, average and the exported weights, flat."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state = {f"network.{name}": t for name, t in checkpoint["network"].items()}
    state |= {f"average.{name}": t for name, t in (checkpoint["average"] or {}).items()}
    for place, moments in checkpoint["optimizer"]["state"].items():
        state |= {f"optimizer.{place}.{name}": t for name, t in moments.items()}
    return state | {f"model.{name}": t for name, t in load_file(folder / "model.safetensors").items()}


def assert_same(first: Path, second: Path) -> None:
    """Two runs ended in the same bits."""
    a, b = final_state(first), final_state(second)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


def launch(folder: Path, config: RunConfig, *options: str, **kwargs: Any) -> subprocess.Popen[str]:
    """Two processes on this machine, by torchrun."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["overlock.cli", "train", "--config", str(folder / "config.yaml"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **kwargs
    )
