"""docs/troubleshooting.md says what the code does: its messages, its options, its figures."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import torch
from helpers import meta

from overlock import VARIANTS, ops
from overlock.training import DetectConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "troubleshooting.md").read_text()
SOURCES = "".join(file.read_text() for file in sorted((ROOT / "src").rglob("*.py")))
STRINGS = re.sub(r'"\s*\n\s*f?"', "", SOURCES)
"""The sources, with strings of several lines as one."""


def test_messages_are_those_of_the_code():
    rows = TEXT.partition("| the message says |")[2].partition("\n\n")[0]
    messages = re.findall(r"^\| `([^`]+)`", rows, flags=re.MULTILINE)
    messages += re.findall(r"^\*\*`([^`]+)`", TEXT, flags=re.MULTILINE)
    assert len(messages) >= 8
    parts = [part.strip(" ;:") for message in messages for part in re.split(r"\.\.\.|\d+ x \d+|fp16", message)]
    assert not [part for part in parts if part and part.strip("[]'") not in STRINGS]


def test_options_are_those_of_a_run():
    known = {field.name for kind in (TrainConfig, DetectConfig) for field in fields(kind)}
    groups = {field.name: {part.name for part in fields(field.default_factory)} for field in fields(TrainConfig)
              if field.name in ("optim", "runtime", "safety")}  # fmt: skip
    for group, name in re.findall(r"`(?:--)?(optim|runtime|safety)\.(\w+)", TEXT):
        assert name in groups[group]
    for name in ("image_size", "stem_stride", "proposals", "regions", "min_size", "model", "weights"):
        assert f"--{name}" in TEXT
        assert name in known


@pytest.mark.parametrize("name", VARIANTS)
def test_channels(name):
    (row,) = re.findall(rf"^\| `{name}` \| ([\d, ]+) \| (\d+) \|$", TEXT, flags=re.MULTILINE)
    channels = [int(number) for number in row[0].split(",")]
    assert meta(name, features_only=True).feature_info.channels() == channels
    assert channels[3] - VARIANTS[name].dims[3] == int(row[1])


def test_small_images():
    network = timm.create_model("overlock_atto", num_classes=3, stem_stride=1).eval()
    with torch.no_grad(), ops.backend("torch"):  # which compiles nothing
        assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    ordinary = timm.create_model("overlock_atto", num_classes=3)
    with pytest.raises(ValueError, match="at least 32 x 32 pixels, got 31 x 40"):
        ordinary(torch.zeros(1, 3, 31, 40))
    network.load_state_dict(ordinary.state_dict())  # weights of one stride load into the other


def test_extras():
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", table, flags=re.MULTILINE)) - {"checks", "dev"}
    rows = TEXT.partition("| extra | for |")[2]
    assert set(re.findall(r"`(\w+)`", rows)) == extras
