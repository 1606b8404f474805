"""The commands of docs/embeddings.md run, one after the other."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from pictures import make_classes
from PIL import Image

from overlock.checkpoints import MODEL_FILE
from overlock.cli import main

pytest.importorskip("pyarrow")
pytest.importorskip("faiss")
ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "embeddings.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch, default_file) -> Path:
    """Photographs by class, one of them twice, and a run's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    photos = make_classes(tmp_path / "photos", 6)
    (photos / "red" / "copy.png").write_bytes((photos / "red" / "0.png").read_bytes())
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runs" / "photos").mkdir(parents=True)
    (tmp_path / "runs" / "photos" / MODEL_FILE).symlink_to(default_file)
    return tmp_path


def test_commands(place, capsys):
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    for line in lines:
        if line.startswith("overlock "):
            assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert {line.split()[0] for line in lines} == {"overlock", "torchrun", "srun"}
    assert Image.open(place / "runs" / "found.png").width > 128 * 5
    assert "red/0.png" in (place / "runs" / "duplicates.csv").read_text()
    assert "ivf" in capsys.readouterr().out
    pandas = pytest.importorskip("pandas")
    table = pandas.read_parquet(place / "runs" / "vectors")
    assert (len(table), table.vector[0].shape) == (19, (256,))


@pytest.mark.slow
def test_python(place):
    """With a Ray of this machine."""
    ray = pytest.importorskip("ray")
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    main(["embed", "photos", "--out", "runs/vectors"])
    try:
        for block in blocks("python"):
            exec(block, {})
    finally:
        ray.shutdown()
    assert list((place / "runs" / "ray_vectors").glob("*.parquet"))
