"""A run of version 0.1, stopped in its third epoch of four, is resumed and predicts with the present version."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import yaml

from overlock.cli import main
from overlock.deploy import Predictor
from overlock.settings import RENAMED, VALUES, renew, renew_options
from overlock.training import CONFIGS, SegmentConfig, TrainConfig

STORED = Path(__file__).parents[1] / "assets" / "run_0.1"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(STORED, tmp_path / "old"))


@pytest.mark.parametrize("words", [("--config", "{}"), ("--config={}",)])
def test_resumes(words, folder, capsys):
    pytest.importorskip("sklearn")
    config = [word.format(folder / "config.yaml") for word in words]
    assert main(["train", *config, "--output", str(folder), "--resume"]) == 0
    assert "config.yaml: some of these settings have other names now" in capsys.readouterr().err
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[:2] == list(csv.DictReader((STORED / "log.csv").open()))
    assert (folder / "model.safetensors").is_file()


def test_weights_predict(folder):
    predictor = Predictor.from_checkpoint(folder / "best.safetensors", device="cpu")
    assert set(predictor(Path(__file__).parents[2] / "examples/photos/cat.jpg").labels) <= {str(i) for i in range(10)}


def test_settings_of_earlier_names():
    old = yaml.safe_load((STORED / "config.yaml").read_text())
    assert {"machine", "lr_batch", "returns"} <= {*old, *old["optim"], *old["safety"]}
    old["machine"] |= dict(recompute=True, workers=3)
    old["optim"] |= dict(schedule="drops", drop_epochs=[2, 3])
    config = TrainConfig.from_dict(old)
    assert (config.runtime.grad_checkpointing, config.runtime.workers) == (True, 3)
    assert (config.optim.base_batch_size, config.optim.schedule, config.optim.milestones) == (32, "multistep", (2, 3))
    assert renew(config.to_dict()) == config.to_dict()
    assert SegmentConfig.from_dict(dict(data="x", shift=True)).reduce_zero_label
    for both in (dict(machine={}, runtime={}), dict(optim=dict(lr_batch=4, base_batch_size=4)), dict(shift=True)):
        with pytest.raises(ValueError, match=r"is called .* now, and both are given"):
            renew({**both, "reduce_zero_label": False, "machine": dict(workers=1), "runtime": dict(workers=2)})


def test_new_names_are_settings_or_options():
    known = {"overwrite", "progress.rollbacks"}
    for kind in CONFIGS.values():
        settings = kind(data="x").to_dict()
        known |= {*settings, *(f"{a}.{b}" for a, group in settings.items() if isinstance(group, dict) for b in group)}
    assert {*RENAMED.values(), *VALUES} <= known
    assert not {*RENAMED} & known


def test_options_of_earlier_names():
    notes: list[str] = []
    words = ("train", "x", "--machine.workers=2", "--shift", "true", "--optim.schedule", "line", "--force")
    assert renew_options(words, notes.append) == [
        "train", "x", "--runtime.workers=2", "--reduce_zero_label", "true", "--optim.schedule", "linear", "--overwrite",
    ]  # fmt: skip
    assert renew_options(["--optim.schedule=drops"], notes.append) == ["--optim.schedule=multistep"]
    assert notes == [
        "--machine.workers is now called --runtime.workers",
        "--shift is now called --reduce_zero_label",
        "line is now called linear",
        "--force is now called --overwrite",
        "drops is now called multistep",
    ]
