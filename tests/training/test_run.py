"""A run learns, writes what prediction needs, and repeats."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import yaml
from pictures import COLOURS, make_classes, make_image
from torch.nn import functional as F

from overlock.checkpoint import load_classifier
from overlock.deploy import Predictor
from overlock.training import TrainConfig
from overlock.training.run import train


def settings(folder, **changes) -> TrainConfig:
    base = dict(
        data=str(folder / "data"), output=str(folder / "run"), model="overlock_atto", image_size=32, epochs=4,
        batch_size=8, lr=2e-3, workers=0,
    )  # fmt: skip
    return TrainConfig(**{**base, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    make_classes(folder / "data", 20)
    return folder, train(settings(folder, epochs=12))


def test_learns_colours(trained):
    _, result = trained
    assert result.accuracy == 1.0
    predictor = Predictor.from_checkpoint(result.folder)
    for colour in COLOURS:
        assert predictor(make_image(colour, 12345, 50)).labels[0] == colour


def test_the_reported_accuracy_is_that_of_the_saved_weights(tmp_path):
    make_classes(tmp_path / "data" / "train", 4)
    make_classes(tmp_path / "data" / "val", 5, seed=77)
    result = train(settings(tmp_path, epochs=1, lr=3e-4, augmentation="strong"))
    predictor = Predictor.from_checkpoint(tmp_path / "run", device="cpu")
    files = sorted((tmp_path / "data" / "val").rglob("*.png"))
    hits = sum(p.labels[0] == f.parent.name for f, p in zip(files, predictor(files), strict=True))
    assert result.accuracy == pytest.approx(hits / len(files))


def test_files_of_a_run(trained):
    folder, result = trained
    assert sorted(path.name for path in result.folder.iterdir()) == ["config.json", "model.safetensors", "train.yaml"]
    saved = yaml.safe_load((result.folder / "train.yaml").read_text())
    assert TrainConfig(**saved) == settings(folder, epochs=12)
    network, record = load_classifier(result.folder)
    assert record.classes == tuple(COLOURS)
    assert record.preprocessing["input_size"] == (3, 32, 32)
    assert not any(name.startswith("aux_head") for name in network.state_dict())


def test_timm_loads_a_run(trained):
    _, result = trained
    ours, _ = load_classifier(result.folder)
    theirs = timm.create_model(f"local-dir:{result.folder}", pretrained=True).eval()
    assert theirs.pretrained_cfg["label_names"] == list(COLOURS)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images))


def test_repeats_with_the_seed(tmp_path):
    make_classes(tmp_path / "data", 5)
    runs = [train(settings(tmp_path, epochs=1, seed=s, output=str(tmp_path / f"{i}"))) for i, s in enumerate((1, 1, 2))]
    states = [load_classifier(run.folder)[0].state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_fine_tunes_from_a_run_with_other_classes(trained, tmp_path):
    _, result = trained
    make_classes(tmp_path / "data", 4, colours=("red", "green"))
    weights = str(result.folder / "model.safetensors")
    train(settings(tmp_path, epochs=1, lr=1e-9, weight_decay=0.0, weights=weights))
    before, after = (load_classifier(f)[0].state_dict() for f in (result.folder, tmp_path / "run"))
    assert after["head.fc.weight"].shape[0] == 2
    name = "base_net.stages.0.blocks.0.ffn.expand.weight"
    torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)


def test_trains_any_model_of_timm_and_grey_images(tmp_path):
    make_classes(tmp_path / "data", 4)
    result = train(settings(tmp_path, model="test_convnext", image_size=64, in_chans=1, epochs=1))
    assert 0 <= result.accuracy <= 1
    assert Predictor.from_checkpoint(result.folder)(make_image("red", 0)).labels[0] in COLOURS


def test_loss_schedule_and_parameter_groups(tmp_path):
    """The step's loss is main + 0.4 auxiliary; the rate warms up and falls as a cosine; norms do not decay."""
    from lightning import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    from overlock.training.modules import Classifier

    config = settings(tmp_path, epochs=10, warmup_epochs=2, lr=1e-2)
    torch.manual_seed(0)
    network = timm.create_model("test_convnext", num_classes=3)
    outputs = torch.randn(2, 8, 3).unbind()
    labels = torch.arange(8) % 3

    class Recorded(Classifier):
        rates: list[float] = []

        def on_train_batch_start(self, *_):
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    task = Recorded(network, config, 3)
    task.log = lambda *_, **__: None
    task.network.forward = lambda _: outputs
    expected = sum(w * F.cross_entropy(o, labels, label_smoothing=0.1) for w, o in zip((1, 0.4), outputs, strict=True))
    torch.testing.assert_close(task.training_step((torch.zeros(8, 3, 8, 8), labels), 0), expected)
    del task.network.forward, task.log

    data = DataLoader(TensorDataset(torch.randn(40, 3, 32, 32), torch.arange(40) % 3), batch_size=8)
    trainer = Trainer(
        max_epochs=10, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(task, data)
    assert len(task.rates) == 50
    warm = [1e-5 + i * (1e-2 - 1e-5) / 10 for i in range(10)]
    fall = [1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * i / 40)) / 2 for i in range(40)]
    assert task.rates[:10] == pytest.approx(warm)
    assert task.rates[10:] == pytest.approx(fall)
    for group in trainer.optimizers[0].param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_output_is_not_overwritten_unasked(trained):
    folder, result = trained
    before = (result.folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="not empty; choose another one or pass --overwrite"):
        train(settings(folder))
    assert (result.folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model="overlock_tt"), "unknown model 'overlock_tt'; did you mean 'overlock_t'"),
        (dict(image_size=16), "image_size must be at least 32 with this stem, got 16"),
        (dict(weights="nowhere.pth"), "nowhere.pth: no such file"),
        (dict(data="nowhere"), "nowhere: no such folder"),
        (dict(model="test_convnext", weights="a.pth"), "weights are read for OverLoCK's models"),
    ],
)
def test_faults_leave_nothing_behind(tmp_path, changes, message):
    make_classes(tmp_path / "data", 2)
    with pytest.raises(ValueError, match=message):
        train(settings(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_output_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; choose another output"):
        train(settings(tmp_path, output=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(tmp_path, workers):
    root = make_classes(tmp_path / "data", 4)
    for file in root.rglob("*.png"):
        if file.parent.name == "red":
            file.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"red/\d\.png: not an image; replace or remove the file"):
        train(settings(tmp_path, epochs=1, workers=workers))
    assert not (tmp_path / "run").exists()
