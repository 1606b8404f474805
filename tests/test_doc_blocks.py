"""The code and the commands in the texts run, where that is cheap; what does not run here says why."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise
from pictures import make_image

from overlock.checkpoints import MODEL_FILE, Record, load_classifier, save_model
from overlock.cli import main, make_parser
from overlock.cli.lists import join_lists
from overlock.deploy.writers import FORMS

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {file.name: file.read_text() for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
PREPROCESSING = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)

PYTHON = ("README.md", "ablations.md", "classify.md", "detect.md", "segment.md", "start.md")
"""Texts whose blocks of Python run here, each text in one program; python.md and predict.md are looked at closer."""

ELSEWHERE = {
    "architecture.md": "a CUDA graph needs a GPU: benchmarks/captured.py captures one",
    "detection_segmentation.md": "tests/network/test_output_stride.py trains that network",
    "embeddings.md": "tests/embeddings/test_docs_embeddings.py",
    "export.md": "tests/export makes the same calls, or runs them",
    "frameworks.md": "tests/integrations",
}
"""What runs the blocks of Python of other texts, or why nothing does."""

CHEAP = (
    "overlock predict examples/photos/cat.jpg",
    "overlock summary overlock_t --image_size 512 512",
    "overlock kernels examples/photos --at 200 150 --save kernels.jpg",
)
"""Commands that run here, on what comes with the package."""
NOT_RUN = {
    r"train digits|predict runs/digits": "continuous integration runs them: .ci/run",
    r"overlock (embed|search|duplicates|probe)": "tests/embeddings/test_docs_embeddings.py runs them",
    r"train|ablate|average": "trains, or needs what was trained; tests/training and tests/test_tutorial.py do so",
    r"overlock demo": "serves until Ctrl-C; tests/demo/test_page.py opens the page",
    r"--checkpoint overlock_t$": "downloads weights",
    r"summary": "counts many or large networks; tests/analysis does so",
    r"cam": "needs an extra; tests/analysis/test_activation_maps.py draws such maps",
    r"compile": "takes half a minute; tests/kernels/test_compilation.py compiles",
    r"": "needs files of the reader's",
}
"""Why the others do not run, by a pattern of the command."""


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[name], flags=re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[str]:
    lines = "".join(blocks(name, "bash")).replace("\\\n", "").splitlines()
    return [
        " ".join(shlex.join(shlex.split(line, comments=True)).split()) for line in lines if line.startswith("overlock ")
    ]


COMMANDS = sorted({line for name in TEXTS for line in commands(name)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Networks as if trained, which the texts name."""
    classifier = dict(model_args={"num_classes": 2}, classes=("3", "7"), preprocessing=PREPROCESSING)
    few = dict(hidden_channels=16)
    detector = dict(
        head="faster_rcnn", classes=("a", "b"), model_args=few | dict(min_size=64, max_size=64, proposals=9)
    )
    segmenter = dict(head="upernet", classes=("a", "b"), model_args=few, preprocessing=dict(scale=(64, 64)))
    folder = tmp_path_factory.mktemp("trained")
    kinds: dict[str, dict[str, Any]] = dict(photos=classifier, cells=detector, streets=segmenter)
    for name, settings in kinds.items():
        record = Record(model="overlock_atto", **settings)
        save_model(folder / name / MODEL_FILE, randomise(record.make_network()).state_dict(), record)
    return folder


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder with the package's examples and some images."""
    (tmp_path / "new_photos").mkdir()
    for name in ("new_photos/1.jpg", "cells.jpg", "street.jpg"):
        make_image("red", 0, 64).save(tmp_path / name)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks(name: str) -> dict[str, Any]:
    """All blocks of a text, one after the other, in one namespace."""
    names: dict[str, Any] = {}
    with torch.no_grad():
        for block in blocks(name, "python"):
            exec(compile(block, name, "exec"), names)
    return names


@pytest.mark.parametrize("name", PYTHON)
def test_python_runs(name, desk, runs):
    (desk / "runs").symlink_to(runs)
    assert run_blocks(name)


def test_python_gives_what_it_says(desk, default_file):
    names = run_blocks("python.md")
    assert names["logits"].shape == (2, 10)
    assert [feature.shape[-1] for feature in names["features"]] == [56, 28, 14, 7]
    x, model = torch.randn(1, 3, 64, 64), names["model"].eval()
    with torch.no_grad():
        torch.testing.assert_close(names["fast"](x), model(x), atol=1e-4, rtol=1e-3)
    assert names["y"].shape == names["z"].shape == (1, 64, 28, 40)
    assert [tuple(feature.shape[-2:]) for feature in names["maps"]] == [(64, 80), (32, 40), (16, 20), (8, 10)]
    assert set(names["found"]) == {"boxes", "labels", "scores", "masks"}
    assert names["pixels"].shape == (1, 150, 256, 320)
    names = run_blocks("predict.md")
    assert names["result"].labels[0] in load_classifier(default_file)[1].classes
    assert [len(result.labels) for result in names["results"]] == [3, 3]
    assert len(names["names"]) == len(list((ROOT / "examples" / "photos").glob("*.jpg")))


def test_no_python_is_forgotten():
    with_python = {name for name in TEXTS if blocks(name, "python")}
    assert with_python == {*PYTHON, "python.md", "predict.md", *ELSEWHERE}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line, tmp_path, monkeypatch):
    words = shlex.split(line)[1:]
    if "--config" in words:
        monkeypatch.chdir(tmp_path)
        file = tmp_path / words[words.index("--config") + 1]
        file.parent.mkdir(parents=True)
        file.write_text("data: photos\n")
    parser, subparsers = make_parser(words)
    parser.parse_args(join_lists(words, subparsers[words[0]]))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(line, desk):
    if line not in CHEAP:
        pytest.skip(next(reason for pattern, reason in NOT_RUN.items() if re.search(pattern, line)))
    assert main(shlex.split(line)[1:]) == 0


def test_cheap_commands_are_in_the_texts():
    assert set(CHEAP) <= set(COMMANDS)


def test_table_of_what_is_saved():
    rows = TEXTS["predict.md"].partition("| `--save` |")[2].partition("\n\n")[0]
    told = re.findall(r"`FILE(\.\w+)`", rows)
    assert sorted(told) == sorted({ending for form in FORMS for ending in form.endings})
