"""Rows of YOLO files, in the installed ultralytics."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import images, relative_error
from PIL import Image, ImageDraw
from torch import nn

import overlock

os.environ |= {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0"}  # which ultralytics reads while it is imported
ultralytics = pytest.importorskip("ultralytics")

from overlock.integrations.ultralytics import MODELS, FeatureLevel, OverLoCKBackbone, register, rows  # noqa: E402
from overlock.integrations.ultralytics.registration import count_gflops  # noqa: E402

EVERY_ROW = dict(
    nc=2,
    scales={"n": [0.5, 0.25, 1024], "m": [1.0, 0.5, 128]},
    backbone=[
        [-1, 1, "Conv", [64, 3, 4]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 2, "C2fContMix", [128, 9]],
        [-1, 1, "Conv", [256, 3, 2]],
        [-1, 1, "ContMixBlock", [256, 7]],
    ],
    head=[
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[2, -1], 1, "Concat", [1]],
        [-1, 2, "DynamicBlocks", [128, 7]],
        [[-1, 4], 1, "Detect", ["nc"]],
    ],
)


@pytest.fixture(autouse=True)
def plain_kernels():
    """The portable ones, which need no compilation."""
    with overlock.ops.backend("torch"):
        yield


def build(settings: dict, scale: str = "n") -> nn.Module:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(copy.deepcopy(settings) | {"scale": scale}, verbose=False)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with overlock.ops.backend("torch"):
        return build(EVERY_ROW)


def test_widths_and_repeats():
    """As ultralytics scales its own rows: by width, most channels and depth."""
    for scale, width, repeats in (("n", 32, 1), ("m", 64, 2)):
        network = build(EVERY_ROW, scale).model
        assert network[2].cv2.conv.out_channels == width
        assert len(network[2].m) == len(network[7].blocks) == repeats
        assert network[4].block.norm1.weight.numel() == 64
        assert network[7].split == [width, 64]
        assert network[8].cv2[0][0].conv.in_channels == width


def test_trains_in_half_precision(model):
    """All parameters of our rows get finite gradients under autocast."""
    network = copy.deepcopy(model).train()
    with torch.autocast("cpu", torch.bfloat16):
        predictions = network(images(2, 3, 64, 96))
    sum(x.float().square().mean() for x in predictions["feats"]).backward()
    ours = [p for layer in network.model if type(layer).__module__ == rows.__name__ for p in layer.parameters()]
    assert len(ours) > 100
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours)


def test_counts_contmix(model, monkeypatch):
    """What is counted beyond the convolutions is section 3.2: affinities, kernels, and their application."""
    mixers = [module for module in model.modules() if isinstance(module, overlock.ContMix)]
    sides = [32, 16, 32]  # of maps of an image of 256 x 256
    expected = 0
    for mixer, side in zip(mixers, sides, strict=True):
        channels, groups, taps = mixer.out.conv.out_channels, mixer.groups, mixer.kernels.out_features
        affinities = channels // 2 * 49
        kernels = groups * 49 * taps
        application = channels // 2 * taps
        expected += 2 * side**2 * (affinities + kernels + application)
    counted = count_gflops(model, 256)
    for formula in ("count_generation", "count_applications"):
        monkeypatch.setattr(f"overlock.analysis.cost.{formula}", lambda *shapes, **others: 0)
    assert counted - count_gflops(model, 256) == pytest.approx(expected / 1e9, rel=1e-6)


def test_fused(model):
    """The same detections, the cost of the merged network, and a second fusion changes nothing."""
    network, x = copy.deepcopy(model).eval(), images(1, 3, 64, 96)
    expected, gflops = network(x)[0], ultralytics.utils.torch_utils.get_flops(network, 64)
    fused = network.fuse(verbose=False)
    assert relative_error(fused(x)[0], expected) < 1e-4
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert ultralytics.utils.torch_utils.get_flops(fused, 64) == pytest.approx(gflops, rel=1e-6)
    part = fused.model[4].block
    assert fused.train().fuse(verbose=False).model[4].block is part
    assert not part.training


@pytest.mark.parametrize(("name", "gflops"), [("yolo11n-contmix", 6.7), ("yolo11n-overlock", 19.4)])
def test_files(name, gflops):
    """Both shipped files build by their names, at strides 8, 16 and 32, and tell their true cost."""
    register()
    network = ultralytics.YOLO(MODELS / f"{name}.yaml").model
    assert network.stride.tolist() == [8, 16, 32]
    assert round(ultralytics.utils.torch_utils.get_flops(network, 640), 1) == gflops


def test_other_models_are_as_before():
    """A model without our rows builds and is counted by ultralytics alone."""
    get_flops = ultralytics.utils.torch_utils.get_flops
    network = ultralytics.YOLO("yolo11n.yaml").model
    assert get_flops(network, 64) == get_flops.__wrapped__(network, 64) > 0


def test_weights(tmp_path):
    """A file of weights goes into the backbone, whose images are normalised as it was trained."""
    import timm
    from safetensors.torch import save_file

    network = timm.create_model("overlock_atto", num_classes=3)
    save_file(network.state_dict(), tmp_path / "atto.safetensors")
    models, weights = {"n": "overlock_atto"}, {"n": str(tmp_path / "atto.safetensors")}
    backbone = OverLoCKBackbone(3, 32, "n", models, weights)
    stem = next(iter(network.base_net.parameters()))
    assert torch.equal(next(iter(backbone.pyramid.backbone.base_net.parameters())), stem)
    assert backbone.mean.flatten().tolist() == pytest.approx(network.pretrained_cfg["mean"])
    grey = OverLoCKBackbone(1, 32, "n", models)
    assert [tuple(x.shape) for x in grey(images(1, 1, 64, 96))] == [(1, 32, 8, 12), (1, 32, 4, 6), (1, 32, 2, 3)]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: rows.ContMixBlock(32, 64), "32 come in, so it cannot give 64"),
        (lambda: rows.DynamicBlocks(64, 64), "64 of 64 channels are features"),
        (lambda: FeatureLevel(64, 32, 0), "must have the 64 channels"),
        (lambda: OverLoCKBackbone(3, 32, "", {"n": "overlock_atto"}), "no backbone for scale ''"),
        (lambda: rows.C2fContMix(32, 30, 1), "even number of channels, got 15"),
    ],
)
def test_wrong_rows_are_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def make_data(folder) -> str:
    """Red boxes on white: eight images to learn from, four to test on."""
    for part, count in (("train", 8), ("val", 4)):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (96, 96), "white")
            ImageDraw.Draw(image).rectangle((8 * i, 20, 8 * i + 31, 51), fill="red")
            image.save(folder / "images" / part / f"{i}.png")
            (folder / "labels" / part / f"{i}.txt").write_text(f"0 {(8 * i + 16) / 96} {36 / 96} {1 / 3} {1 / 3}\n")
    file = folder / "boxes.yaml"
    file.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: {{0: box}}\n")
    return str(file)


@pytest.mark.slow
def test_example(tmp_path):
    """That of docs/frameworks.md, as it stands."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "frameworks.md").read_text()
    example = re.search(r"```python\n(from ultralytics.*?)```", text, flags=re.DOTALL)
    assert example is not None
    (tmp_path / "boxes.yaml").symlink_to(make_data(tmp_path / "data"))
    (tmp_path / "image.png").symlink_to(tmp_path / "data" / "images" / "val" / "0.png")
    begin = f"from ultralytics import settings; settings.update(runs_dir={str(tmp_path / 'runs')!r})\n"
    environment = os.environ | {"YOLO_CONFIG_DIR": str(tmp_path)}  # where these settings are kept
    environment.pop("PYTEST_CURRENT_TEST", None)  # with which ultralytics writes beside its own tests
    subprocess.run([sys.executable, "-c", begin + example[1]], check=True, cwd=tmp_path, env=environment)
    assert list((tmp_path / "runs").rglob("best.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolo11n-contmix", "yolo11n-overlock"])
def test_trains_and_exports(name, tmp_path):
    """An epoch and a test; in another process, without a word of ours, another epoch and an export; the same boxes."""
    runtime = pytest.importorskip("onnxruntime")
    settings = dict(data=make_data(tmp_path / "data"), epochs=1, imgsz=96, batch=4, workers=0, plots=False)
    places = dict(project=str(tmp_path / "runs"), name="first", device="cuda" if torch.cuda.is_available() else "cpu")
    ultralytics.YOLO(MODELS / f"{name}.yaml").train(**settings, **places)
    best = tmp_path / "runs" / "first" / "weights" / "best.pt"
    script = (
        f"from ultralytics import YOLO; model = YOLO({str(best)!r}); model.train(**{settings!r}, "
        f"**{places | {'name': 'second'}!r}); YOLO({str(best)!r}).export(format='onnx', imgsz=96, simplify=False)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert (tmp_path / "runs" / "second" / "weights" / "best.pt").is_file()
    session, x = runtime.InferenceSession(best.with_suffix(".onnx")), images(1, 3, 96, 96)
    exported = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        expected = ultralytics.YOLO(best).model.eval()(x)[0]
    assert relative_error(exported, expected) < 1e-4
