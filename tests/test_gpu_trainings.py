"""benchmarks/gpu_studies.py and gpu_imagenette.py, as far as a machine without a GPU can tell."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from bare import ROOT
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.transforms import v2

sys.path.append(str(ROOT / "benchmarks"))

from captured import CapturedTraining, train_together
from gpu_images import CroppedImages, Normalise, ShiftedImages, draw_crops, draw_order

from overlock.checkpoints import load_model
from overlock.cli import main
from overlock.training.config import EmaConfig, LossConfig, OptimConfig, TrainConfig

PLAIN = Normalise(dict(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255)), "cpu")


def photographs(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_order_goes_through_all_images_before_any_comes_again():
    order = draw_order(7, 20, torch.Generator().manual_seed(0))
    assert [sorted(order[i : i + 7].tolist()) for i in (0, 7)] == [list(range(7))] * 2
    assert len(order) == 20
    assert order[:7].tolist() != order[7:14].tolist()


def test_shifted_images_are_crops_of_padded_ones():
    """Over reflected borders; the same seed gives the same batches, whatever is trained on them."""
    images, labels = photographs(6, 3, 8, 8), torch.arange(6)
    draws = [ShiftedImages(images, labels, PLAIN, side=8, padding=3, batch=4, steps=5, seed=seed) for seed in (1, 1, 2)]
    at = torch.tensor([3])
    batch, named = draws[0](at)
    assert torch.equal(batch, draws[1](at)[0])
    assert not torch.equal(batch, draws[2](at)[0])
    padded = v2.functional.pad(images.float(), [3, 3, 3, 3], padding_mode="reflect")
    for image, label in zip(batch, named, strict=True):
        windows = padded[label].unfold(1, 8, 1).unfold(2, 8, 1)  # 3, 7, 7, 8, 8
        found = [(windows - x[:, None, None]).abs().amax(dim=(0, 3, 4)).min() for x in (image, image.flip(-1))]
        assert min(found) < 1e-3


def test_crops_lie_within_their_images():
    sizes = torch.tensor([[160, 214], [214, 160], [160, 160]]).repeat(2000, 1)
    boxes = draw_crops(sizes, (0.3, 1.0), torch.Generator().manual_seed(0))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert bool((boxes >= 0).all())
    assert bool((boxes[:, 2:] <= sizes.flip(1) + 1e-3).all())
    assert float((width * height / sizes.prod(dim=1)).min()) == pytest.approx(0.3, abs=0.01)
    assert float((width / height).max()) == pytest.approx(4 / 3, abs=0.01)


def test_cropped_images_are_torchvisions_resized_crops():
    images, sizes, labels = photographs(5, 3, 40, 40), torch.tensor([[30, 40]] * 5), torch.arange(5)
    draw = CroppedImages(
        images, sizes, labels, PLAIN, side=16, batch=5, steps=2, seed=3, scale=(0.3, 1.0), jitter=0.0, cutmix=0.0,
        classes=5,
    )  # fmt: skip
    made = torch.Generator().manual_seed(3)
    order = draw_order(5, 10, made)
    left, top, right, bottom = draw_crops(sizes[order], (0.3, 1.0), made).unbind(1)
    batch, targets = draw(torch.tensor([1]))
    assert torch.equal(targets, torch.eye(5)[order[5:]])
    for place, image in enumerate(batch, start=5):
        steps = (torch.arange(16) + 0.5) / 16
        x = left[place] + steps * (right[place] - left[place])
        y = top[place] + steps * (bottom[place] - top[place])
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1) / 20 - 1
        whole = images[order[place]][None].float()
        expected = nn.functional.grid_sample(whole, grid[None], align_corners=False)[0]
        assert min((expected - x).abs().max() for x in (image, image.flip(-1))) < 0.01


def test_mixed_images_and_their_targets_agree():
    """A batch of black and white images: the share of white is that of its class."""
    images = torch.stack([torch.zeros(3, 16, 16), torch.full((3, 16, 16), 255.0)]).to(torch.uint8)
    draw = CroppedImages(
        images, torch.tensor([[16, 16]] * 2), torch.arange(2), PLAIN, side=16, batch=2, steps=20, seed=0,
        scale=(0.5, 0.6), jitter=0.0, cutmix=1.0, classes=2,
    )  # fmt: skip
    shares = []
    for step in range(20):
        batch, targets = draw(torch.tensor([step]))
        torch.testing.assert_close(batch.mean(dim=(1, 2, 3)) / 255, targets[:, 1], atol=0.02, rtol=0)
        shares.append(float(targets.max()))
    assert min(shares) < 0.9


@pytest.fixture
def training() -> CapturedTraining:
    config = TrainConfig(
        data="none", model="overlock_atto", epochs=2, batch_size=8, loss=LossConfig(aux_weight=0),
        optim=OptimConfig(lr=0.01, base_batch_size=8, warmup_epochs=0.5), ema=EmaConfig(decay=0.9, warmup=True),
    )  # fmt: skip
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    inputs = torch.randn(50, 8, 3, 2, 2)
    labels = (inputs.mean(dim=(2, 3, 4)) > 0).long()
    return CapturedTraining(
        network, config, lambda at: (inputs[at].squeeze(0), labels[at].squeeze(0)), most_steps=50, classes=2
    )


def test_steps_are_those_of_the_package(training):
    """Rates rise and fall, the average is timm's, the loss falls; what is measured beforehand leaves no trace."""
    before = {name: x.clone() for name, x in training.network.state_dict().items()}
    training.plan(10)
    training.capture()
    for name, x in training.network.state_dict().items():
        assert torch.equal(x, before[name]), name
    training.plan(40)
    average = ModelEmaV3(training.network, decay=0.9, use_warmup=True)
    seen = []

    def watch(done: int) -> bool:
        seen.append(done)
        return True

    for step in range(20):
        training.advance()
        average.update(training.network, step=step + 1)
    for name, x in average.module.state_dict().items():
        if x.is_floating_point():
            torch.testing.assert_close(training.average.state_dict()[name], x)
    assert train_together([training], 20, watch=watch)
    assert seen == [20]
    rates = training.rates[:40]
    assert int(rates.argmax()) == 10
    assert float(rates.max()) == pytest.approx(0.01)
    assert float(rates[39]) < 0.001
    assert training.losses[30:40].mean() < training.losses[:10].mean()


def test_average_follows_at_once_where_there_is_none(training):
    training.config = replace(training.config, ema=EmaConfig())
    training.plan(3)
    training.advance()
    torch.testing.assert_close(dict(training.average.named_parameters()), dict(training.network.named_parameters()))


def dry_run(name: str, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--dry-run", "--minutes", "5", "--steps", "20", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_dry_run_of_studies(tmp_path, shared_data, capsys):
    """What it leaves is what ``overlock ablate`` makes its table of."""
    printed = dry_run(
        "gpu_studies", "--data", shared_data / "cifar10", "--out", tmp_path, "--rows", "plain,gate,involution",
        "--seeds", "0,1",
    )  # fmt: skip
    commands = [line.split()[1:] for line in printed.splitlines() if line.startswith("overlock ablate")]
    assert [words[1] for words in commands] == ["roadmap", "mixers"]
    assert main([*commands[0], "--rows", "plain,gate", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["row"], row["n"]) for row in rows] == [("plain", 2), ("gate", 2)]


@pytest.mark.slow
def test_dry_run_of_imagenette(tmp_path, shared_data):
    dry_run("gpu_imagenette", "--data", shared_data / "imagenette", "--out", tmp_path)
    for name in ("overlock_nano", "convnext_femto"):
        network, record = load_model(tmp_path / name / "model.safetensors")
        assert (record.model, len(record.classes)) == (name, 10)
        assert next(network.parameters()).dtype == torch.float32
        log = np.genfromtxt(tmp_path / name / "log.csv", delimiter=",", names=True)
        assert len(log) == 20
