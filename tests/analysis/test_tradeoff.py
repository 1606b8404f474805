"""Accuracy against costs: the published figures, runtimes and their trials, fronts, and the command."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("jsonargparse")  # a machine with a GPU may lack it
from overlock.analysis import runtime_study, runtimes
from overlock.analysis.cost import count_cost
from overlock.analysis.latency import deviation_of, take_turns
from overlock.analysis.published import find_published, read_published
from overlock.analysis.runtime_study import Study, Subject, try_runtimes
from overlock.analysis.runtimes import RUNTIMES, Runtime
from overlock.analysis.tradeoff import Point, pareto_front
from overlock.checkpoints import load_model
from overlock.cli import main
from overlock.cli.tradeoff import ALL, MODELS
from overlock.data import load_test_data
from overlock.deploy.evaluate_classification import evaluate_classifier

CPU = torch.device("cpu")


def fails(capsys, *words: object) -> str:
    assert main(["tradeoff", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_published_figures():
    rows = read_published()
    assert all(row.source and row.macs > 0 and row.params > 0 for row in rows)
    assert {row.model for row in rows if row.model and not timm.is_model(row.model.partition(".")[0])} == set()
    counts = {task: sum(row.task == task for row in rows) for task in dict.fromkeys(row.task for row in rows)}
    assert {task: counts[task] for task in ("mask_rcnn", "cascade_mask_rcnn", "upernet")} == {
        "mask_rcnn": 31, "cascade_mask_rcnn": 27, "upernet": 40,
    }  # fmt: skip
    assert sum(row.task == "classify" and row.source.endswith("Table 2") for row in rows) == 61
    tiny = find_published("overlock_t")
    assert (tiny.method, tiny.score, tiny.macs, tiny.params, tiny.image_size) == ("OverLoCK-T", 84.2, 5.5, 33, 224)
    assert find_published("fastvit_sa36").note == ""  # not the distilled one
    assert find_published("fastvit_sa36.apple_dist_in1k").note == "distilled"
    assert find_published("convnext_tiny").score == 82.1
    assert find_published("overlock_nano") is None


def test_default_models_are_published():
    assert all(find_published(model) is not None for model in MODELS)
    assert set(ALL) == set(RUNTIMES)


def point(cost: float, score: float, note: str = "") -> Point:
    return Point(method="", model="", image_size=224, score=score, macs=cost, params=1, note=note)


def test_pareto_front():
    best, dear, worse, alike = point(1, 80), point(3, 82), point(2, 79), point(3, 82)
    taught = point(1, 85, "distilled")
    assert pareto_front([dear, worse, taught, best, alike], lambda p: p.macs) == [best, dear, alike]
    assert pareto_front([point(2, 80), best], lambda p: p.macs) == [best]  # as good, but dearer
    assert pareto_front([point(1, 79), best], lambda p: p.macs) == [best]  # as cheap, but worse


def test_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    ticks = []
    timings = take_turns(calls, CPU, rounds=2, tick=lambda: ticks.append(1))
    assert "".join(order) == 2 * ("aaaa" + "bbbb")
    assert len(ticks) == 4
    assert all(timing.milliseconds > 0 for timing in timings.values())


def test_deviation():
    reference = torch.tensor([[1.0, -4.0]])
    assert deviation_of(reference + torch.tensor([[0.0, 0.04]]), reference) == pytest.approx(0.01)
    assert deviation_of(torch.tensor([[1.0, float("nan")]]), reference) == float("inf")
    assert deviation_of(torch.zeros(1, 3), reference) == float("inf")


def study(folder: Path, *names: str) -> Study:
    return Study(
        models=("overlock_atto",), batches=(1,), image_size=32, runtimes=names, device=CPU, rounds=2, folder=folder
    )  # fmt: skip


def test_trials(tmp_path, monkeypatch):
    """A runtime that fails or is wrong is told and does not count; what is tried is not tried again."""

    def broken(*_: object) -> runtimes.Call:
        raise RuntimeError("no such operator\nand more")

    wrong = lambda forms, images, _: lambda: forms.merged(images) + 1  # noqa: E731
    monkeypatch.setitem(RUNTIMES, "broken", Runtime(broken))
    monkeypatch.setitem(RUNTIMES, "wrong", Runtime(wrong))
    monkeypatch.setitem(RUNTIMES, "absent", Runtime(broken, ("no_such_package",)))
    told: list[str] = []
    subject = Subject("overlock_atto", 32, 1)
    plan = study(tmp_path, "eager", "fused", "broken", "wrong", "absent")
    best, call = try_runtimes(plan, told.append, lambda _: None)[subject]
    assert best.runtime in {"eager", "fused"}
    assert call().shape == (1, 1000)
    assert [sentence.partition(": ")[2].partition(" ")[0] for sentence in told] == ["RuntimeError:", "logits"]
    trials = {trial.runtime: trial for trial in plan.read("runtimes.csv")}
    assert set(trials) == {"eager", "fused", "broken", "wrong"}
    assert best.milliseconds == pytest.approx(min(trials[name].milliseconds for name in ("eager", "fused")), rel=1e-4)
    assert trials["fused"].deviation < 1e-3
    assert trials["broken"].fault == "RuntimeError: no such operator"
    monkeypatch.setattr(runtime_study, "_try", None)  # which would fail
    again, call = try_runtimes(plan, told.append, lambda _: None)[subject]
    assert (again.runtime, call) == (best.runtime, None)
    with pytest.raises(ValueError, match="runs in no runtime"):
        try_runtimes(study(tmp_path, "broken"), told.append, lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["convnext_atto", "overlock_atto"])
def test_exported(model, tmp_path):
    """ONNX Runtime and OpenVINO, from files that are written once."""
    installed = [name for name in ("onnxruntime", "openvino") if RUNTIMES[name].why_not(model, CPU) is None]
    if not installed:
        pytest.skip("needs ONNX Runtime or OpenVINO")
    forms, images = runtimes.make_forms(model, CPU), torch.randn(2, 3, 64, 64)
    for name in installed:
        call = runtime_study.prepare(forms, images, name, tmp_path)
        assert deviation_of(call(), forms.plain(images)) < 1e-4
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for name in installed:
        runtime_study.prepare(forms, images, name, tmp_path)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["convnext_atto", "overlock_atto"])
def test_compiled(model, tmp_path):
    forms, images = runtimes.make_forms(model, CPU), torch.randn(2, 3, 64, 64)
    call = runtime_study.prepare(forms, images, "compile", tmp_path)
    assert deviation_of(call(), forms.plain(images)) < 1e-4


def test_layer_scales_do_not_hide_the_blocks():
    forms = runtimes.make_forms("convnext_atto", CPU)
    for block in forms.plain.stages[0].blocks:
        assert block.gamma.tolist() == pytest.approx(len(block.gamma) * [0.1])


def test_published_mode(tmp_path, capsys):
    assert main(["tradeoff", "--published", "--output", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == sum(row.task == "classify" for row in read_published())
    front = result["fronts"]["macs"]["paper"]
    assert "OverLoCK-T" in front
    assert "ConvNeXt-B" not in front
    rows = list(csv.DictReader((tmp_path / "tradeoff.csv").open()))
    assert next(row for row in rows if row["method"] == "OverLoCK-B")["fronts"] == "macs_of_paper params_of_paper"
    with Image.open(tmp_path / "tradeoff.png") as drawn:
        both = drawn.width
    assert both > 2 * 500
    assert main(["tradeoff", "--published", "--task", "upernet", "--costs", "macs", "--output", str(tmp_path)]) == 0
    with Image.open(tmp_path / "tradeoff.png") as drawn:
        assert drawn.width == both / 2
    assert "OverLoCK-T (969: 50.3)" in " ".join(capsys.readouterr().out.split())


def test_measured(tmp_path, capsys):
    words = ["tradeoff", "overlock_atto", "starnet_s2", "--image-size", "64", "--batch", "1", "2", "--rounds", "2"]
    words += ["--runtimes", "eager", "fused", "--output", str(tmp_path), "--json"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    rows = [row for row in first["rows"] if row["batch"]]
    assert [(row["model"], row["batch"]) for row in rows] == [
        ("overlock_atto", 1), ("starnet_s2", 1), ("overlock_atto", 2), ("starnet_s2", 2),
    ]  # fmt: skip
    assert all(row["milliseconds"] == pytest.approx(1e3 * row["batch"] / row["images_per_second"]) for row in rows)
    assert all(row["score"] is None for row in rows)  # nothing is published at 64 pixels
    assert "at 64 pixels" in rows[1]["note"]
    total = count_cost("overlock_atto", image_size=(64, 64))[-1]
    assert rows[0]["macs"] == pytest.approx(total.macs / 1e9)
    assert rows[0]["params"] == pytest.approx(total.params / 1e6)
    assert {path.name for path in tmp_path.iterdir()} == {
        "runtimes.csv", "latency.csv", "tradeoff.csv", "tradeoff.png",
    }  # fmt: skip
    kept = (tmp_path / "latency.csv").read_bytes()
    assert main(words) == 0  # nothing is measured again
    assert (tmp_path / "latency.csv").read_bytes() == kept
    (tmp_path / "latency.csv").write_bytes(kept.replace(b"CPU with", b"CPU without"))
    assert "measured on CPU without" in fails(capsys, *words[1:])


def test_trained_networks(default_file, tmp_path, capsys):
    """Their accuracy is measured on given images, and nothing published stands beside it."""
    for part, name in product(("train", "val"), ("cat", "ship")):
        folder = tmp_path / "photos" / part / name
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), "navy").save(folder / "a.png")
    words = ["tradeoff", default_file, "--data", tmp_path / "photos", "--runtimes", "eager", "--rounds", "1"]
    assert main([*map(str, words), "--output", str(tmp_path / "out"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["model"] == "overlock_atto"
    assert row["image_size"] == 32
    assert row["score"] in (0, 50, 100)
    assert row["score"] == 100 * evaluate_classifier(default_file, load_test_data(str(tmp_path / "photos"))).top1
    network, _ = load_model(default_file)
    assert row["params"] < sum(p.numel() for p in network.parameters()) / 1e6  # merged
    assert row["fronts"] == "macs params latency_batch1"
    assert "takes trained networks alone" in fails(capsys, "convnext_tiny", *words[2:])
    assert "runs/typo: no such file or folder" in fails(capsys, "runs/typo")
    assert "--published measures nothing" in fails(capsys, "--published", *words[2:])


def test_accuracy_at_the_size_that_is_timed(default_file, tmp_path, monkeypatch):
    found = SimpleNamespace(top1=0.5)
    asked: list[int | None] = []
    monkeypatch.setattr(
        "overlock.deploy.evaluate_classification.evaluate_classifier",
        lambda *_, image_size: asked.append(image_size) or found,
    )
    monkeypatch.setattr("overlock.data.load_test_data", lambda _: None)
    words = ["tradeoff", default_file, "--data", "photos", "--image-size", 40, "--runtimes", "eager", "--rounds", 1]
    assert main([*map(str, words), "--output", str(tmp_path)]) == 0
    assert asked == [40]
    (trial,) = csv.DictReader((tmp_path / "latency.csv").open())
    assert (trial["image_size"], trial["architecture"]) == ("40", "overlock_atto")


def test_another_network_in_the_same_folder(default_file, tmp_path):
    """Its old times do not count."""
    plan = replace(study(tmp_path, "eager"), models=(str(default_file),))
    try_runtimes(plan, lambda _: None, lambda _: None)
    path = tmp_path / "runtimes.csv"
    path.write_text(path.read_text().replace(",overlock_atto,", ",overlock_nano,"))
    with pytest.raises(ValueError, match="was overlock_nano and is overlock_atto now"):
        plan.read("runtimes.csv")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("convnext_tinny",), "did you mean 'convnext_tiny'"),
        (("--task", "upernet"), "add --published"),
        (("--published", "--costs", "latency"), "--published measures no latency"),
        (("--batch", 0), "--batch must be at least 1"),
        (("--runtimes", "tensorrt"), "--runtimes must be"),
        (("convnext_atto", "--runtimes", "fused"), "runs in no runtime"),
    ],
)
def test_faults(tmp_path, capsys, words, told):
    assert told in fails(capsys, *words, "--output", tmp_path)
