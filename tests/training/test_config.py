"""Settings that cannot be are refused at once."""

from __future__ import annotations

import dataclasses

import pytest

from overlock.training import TrainConfig


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(batch_size=-1), "batch_size must be at least 1"),
        (dict(lr=0.0), "lr must be above 0"),
        (dict(lr=float("nan")), "lr must be a finite number"),
        (dict(workers=-1), "workers must be at least 0"),
        (dict(label_smoothing=1.0), "label_smoothing must be in"),
        (dict(pretrained=True, weights="a.pth"), "either pretrained or weights"),
        (dict(model="resnet18", stem_stride=2), "stem_stride is an option of OverLoCK"),
    ],
)
def test_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(data="digits", **setting)


def test_every_field_has_a_line_of_help():
    from overlock.cli import make_parser

    text = " ".join(make_parser()[1]["train"].format_help().split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in text
    assert text.count("(type: ") + text.count("(required, type: ") >= len(dataclasses.fields(TrainConfig)) - 2
