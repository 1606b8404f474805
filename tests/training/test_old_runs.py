"""A run of version 0.1, stopped in its third epoch of four, is resumed and predicts with the present version."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from overlock.cli import main
from overlock.deploy import Predictor

STORED = Path(__file__).parents[1] / "assets" / "run_0.1"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(STORED, tmp_path / "old"))


def test_resumes(folder):
    pytest.importorskip("sklearn")
    assert main(["train", "--config", str(folder / "config.yaml"), "--output", str(folder), "--resume"]) == 0
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[:2] == list(csv.DictReader((STORED / "log.csv").open()))
    assert (folder / "model.safetensors").is_file()


def test_weights_predict(folder):
    predictor = Predictor.from_checkpoint(folder / "best.safetensors", device="cpu")
    assert set(predictor(Path(__file__).parents[2] / "examples/photos/cat.jpg").labels) <= {str(i) for i in range(10)}
