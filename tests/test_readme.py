"""What the README says is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from helpers import randomise
from pictures import make_image

from overlock import VARIANTS
from overlock.analysis import count_cost
from overlock.checkpoints import MODEL_FILE, Record, load_classifier, save_model
from overlock.cli import make_parser
from overlock.deploy.writers import FORMS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_runs(default_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preprocessing = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)
    network = randomise(timm.create_model("overlock_atto", num_classes=2))
    record = Record(
        model="overlock_atto", model_args={"num_classes": 2}, classes=("3", "7"), preprocessing=preprocessing
    )
    save_model(tmp_path / "runs" / "digits" / MODEL_FILE, network.state_dict(), record)
    (tmp_path / "runs" / "digits" / "examples").mkdir()
    for name in "47":
        make_image("red", 0).save(tmp_path / "runs" / "digits" / "examples" / f"{name}.png")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names: dict[str, object] = {}
    with torch.no_grad():
        for block in blocks("python"):
            exec(block, names)
        assert names["logits"].shape == (2, 10)
        assert [f.shape[-1] for f in names["features"]] == [56, 28, 14, 7]
        model = names["model"].eval()
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(names["fast"](x), model(x), atol=1e-4, rtol=1e-3)
        assert names["y"].shape == (1, 64, 28, 40)
        assert [tuple(m.shape[-2:]) for m in names["maps"]] == [(64, 80), (32, 40), (16, 20), (8, 10)]
        assert set(names["found"]) == {"boxes", "labels", "scores", "masks"}
        assert names["pixels"].shape == (1, 150, 256, 320)
        assert names["result"].labels[0] in load_classifier(default_file)[1].classes
        assert [set(result.labels) for result in names["results"]] == [{"3", "7"}] * 2


TEXTS = "".join(
    (ROOT / "docs" / name).read_text() for name in ("training.md", "detection_segmentation.md", "evidence.md")
)
COMMANDS = [
    line
    for block in blocks("bash") + re.findall(r"```bash\n(.*?)```", TEXTS, flags=re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
    if line.startswith("overlock ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line, tmp_path, monkeypatch):
    words = shlex.split(line, comments=True)[1:]
    if "--config" in words:
        monkeypatch.chdir(tmp_path)
        file = tmp_path / words[words.index("--config") + 1]
        file.parent.mkdir(parents=True)
        file.write_text("data: photos\n")
    parser, _ = make_parser(words)
    parser.parse_args(words)


def test_table_of_what_is_saved():
    rows = README.partition("| `--save` |")[2].partition("\n\n")[0]
    told = re.findall(r"`FILE(\.\w+)`", rows)
    assert sorted(told) == sorted({ending for form in FORMS for ending in form.endings})


def test_table_of_sizes():
    rows = re.findall(r"\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]*) ?\|", README)
    assert [row[0] for row in rows] == list(VARIANTS)
    for name, params, macs, top1 in rows:
        paper = VARIANTS[name].paper
        if paper:
            assert (float(params), float(macs), float(top1)) == (paper.params, paper.macs, paper.top1)
        else:
            total = count_cost(name)[-1]
            assert float(params) == round(total.params / 1e6, 1)
            assert float(macs) == round(total.macs / 1e9, 2)
            assert top1 == ""
