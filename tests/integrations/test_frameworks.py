"""The examples of docs/frameworks.md, with the smallest model, in the installed frameworks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import overlock

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = (ROOT / "docs" / "frameworks.md").read_text().split("\n## ")[1:]


def run(title: str) -> dict[str, Any]:
    """Run a section's example; its variables."""
    section = next(section for section in SECTIONS if section.startswith(title))
    code = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert code is not None
    for package in re.findall(r"^(?:import|from) (\w+)", code[1], flags=re.MULTILINE):
        pytest.importorskip(package)
    names: dict[str, Any] = {"__name__": "example"}
    exec(code[1].replace("overlock_t", "overlock_atto"), names)
    return names


def has_trained(model: torch.nn.Module) -> bool:
    """Whether the last step left gradients in the network's Focus-Net."""
    grads = [p.grad for name, p in model.named_parameters() if "focus_net" in name]
    return len(grads) > 0 and all(grad is not None and bool(grad.isfinite().all()) for grad in grads)


def test_rt_detr():
    names = run("transformers: RT-DETR")
    names["loss"].backward()
    assert has_trained(names["model"])


def test_mask2former():
    names = run("transformers: Mask2Former")
    assert names["masks"].shape == (1, 100, 32, 40)


def test_torchvision():
    names = run("torchvision")
    for name, losses in zip(("retinanet", "fcos"), names["losses"], strict=True):
        sum(losses.values()).backward()
        assert has_trained(names[name])


def test_segmentation_models_pytorch():
    names = run("segmentation_models_pytorch")
    assert [tuple(x.shape) for x in names["pixels"]] == [(2, 3, 128, 160)] * 2


def strides_of_decoders() -> list[tuple[str, int]]:
    """The table of docs/frameworks.md."""
    section = next(section for section in SECTIONS if section.startswith("segmentation_models_pytorch"))
    rows = re.findall(r"^\| (`.+`) \| ([\d, ]+)", section, flags=re.MULTILINE)
    return [
        (name, int(stride))
        for names, strides in rows
        for name in re.findall(r"\w+", names)
        for stride in strides.split(",")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "stride"), strides_of_decoders())
def test_output_strides_of_decoders(decoder, stride):
    smp = pytest.importorskip("segmentation_models_pytorch")
    named = {"encoder_output_stride": stride} if decoder in ("DeepLabV3", "DeepLabV3Plus", "PAN") else {}
    model = getattr(smp, decoder)("tu-overlock_atto", encoder_weights=None, classes=3, **named)
    model(torch.rand(2, 3, 256, 320)).square().mean().backward()
    assert has_trained(model)
    with torch.no_grad():
        assert model.encoder(torch.rand(1, 3, 256, 320))[-1].shape[2:] == (256 // stride, 320 // stride)


def test_lightning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("Lightning")
    assert names["trainer"].global_step == 2
    assert names["trainer"].state.finished


def test_loop():
    """Two rounds; the second trains the early layers at a lower rate."""
    names = run("A loop of your own")
    assert names["rates"][0] < names["rates"][-1]
    assert all(p.requires_grad for p in names["model"].parameters())
    assert names["loss"].isfinite()


def test_torch_hub(tmp_path, monkeypatch):
    """From the clone's root; every variant is an entry point."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "overlock").symlink_to(ROOT)
    monkeypatch.chdir(tmp_path)
    model = run("torch.hub")["model"]
    assert isinstance(model, overlock.OverLoCK)
    assert model.num_classes == 10
    hubconf = (ROOT / "hubconf.py").read_text()
    assert set(re.findall(r'"(overlock_\w+)"', hubconf)) == set(overlock.VARIANTS)
