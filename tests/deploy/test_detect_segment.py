"""Detection and segmentation of files: results, folders of them, and the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from scenes import CLASSES, make_scene, write_scenes

from overlock.checkpoints import MODEL_FILE, Record, read_record, save_model
from overlock.cli import main
from overlock.deploy import Detector, Predictor, Segmenter
from overlock.drawing import colour_of, draw_labels, draw_objects
from overlock.tasks.metrics import SegmentationMetrics

GROUND = ("ground", *CLASSES)


def save_some(folder, record, sharpen=0.0):
    """A network with weights drawn at random; ``sharpen`` makes its classes more certain."""
    torch.manual_seed(0)
    network = record.make_network().eval()
    if sharpen:
        for parameter in network.roi_heads.box_predictor.cls_score.parameters():
            torch.nn.init.normal_(parameter, std=sharpen)
    folder.mkdir()
    save_model(folder / MODEL_FILE, network.state_dict(), record)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=1, val=3)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    sizes = dict(min_size=64, max_size=96, proposals=20)
    record = Record(model="overlock_atto", head="mask_rcnn", classes=CLASSES, model_args=sizes)
    return save_some(tmp_path_factory.mktemp("detector") / "run", record, sharpen=0.5)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    record = Record(
        model="overlock_atto", head="upernet", classes=GROUND, model_args=dict(hidden_channels=32),
        preprocessing=dict(scale=(64, 64)),
    )  # fmt: skip
    return save_some(tmp_path_factory.mktemp("segmenter") / "run", record)


def test_objects_of_images_of_any_form(detector, tmp_path):
    image, *_ = make_scene(0)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    results = Detector.from_checkpoint(detector)([tmp_path / "a.png", image, array], threshold=0.05, batch_size=2)
    first, *others = results
    assert first.source == str(tmp_path / "a.png")
    assert first.size == (64, 64)
    assert len(first.labels) == len(first.scores) == len(first.boxes) == len(first.masks) > 0
    assert set(first.labels) <= set(CLASSES)
    assert min(first.scores) >= 0.05
    assert list(first.scores) == sorted(first.scores, reverse=True)
    assert first.masks.dtype == bool
    for other in others:
        np.testing.assert_allclose(other.boxes, first.boxes, atol=1e-3)


def test_labels_of_a_wide_image(segmenter):
    image = make_scene(0)[0].resize((150, 70))
    (result,) = Segmenter.from_checkpoint(segmenter)([image], flip=True, scales=[0.5, 1])
    assert result.labels.shape == (70, 150)
    shares = result.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert set(shares) <= set(GROUND)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda d, s: Detector.from_checkpoint(s),
            "this is a upernet on overlock_atto, of the task segment, not detect",
        ),
        (lambda d, s: Segmenter.from_checkpoint(d), "of the task detect, not segment"),
        (lambda d, s: Predictor.from_checkpoint(d), "not a classifier; predict with --task detect"),
        (lambda d, s: Detector.from_checkpoint(d)([], threshold=2), "threshold must be in 0 to 1"),
        (lambda d, s: Segmenter.from_checkpoint(s)([make_scene(0)[0]], scales=[0]), "scales must be above 0"),
        (lambda d, s: Detector.from_checkpoint(d)(["nowhere.png"]), r"nowhere\.png: no such image"),
    ],
)
def test_refused(detector, segmenter, call, message):
    with pytest.raises(ValueError, match=message):
        call(detector, segmenter)


def test_command_detects(detector, scenes, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("predict", str(scenes / "val"), str(scenes / "train" / "0.png"), "--checkpoint", str(detector))
    assert main([*words, "--threshold", "0.05", "--save", str(out), "--json", "--batch_size", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "0_2.png", "1.png", "2.png", "objects.json"]
    content = json.loads((out / "objects.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [row["source"] for row in printed]
    assert [category["name"] for category in content["categories"]] == list(CLASSES)
    assert len(content["annotations"]) == sum(len(row["objects"]) for row in printed) > 0
    one, first = content["annotations"][0], printed[0]["objects"][0]
    left, top, right, bottom = first["box"]
    assert one["bbox"] == pytest.approx([left, top, right - left, bottom - top])
    assert one["score"] == first["score"]
    assert rle.decode(one["segmentation"]).sum() == one["area"]
    assert main([*words, "--task", "detect", "--threshold", "1"]) == 0
    assert capsys.readouterr().out.count("none") == 4


def test_command_segments(segmenter, scenes, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("predict", str(scenes / "val"), "--checkpoint", str(segmenter), "--task", "segment")
    assert main([*words, "--save", str(out), "--window", "48"]) == 0
    table = capsys.readouterr().out
    assert table.count("%") >= 3
    for i in range(3):
        with Image.open(out / f"{i}_labels.png") as labels, Image.open(out / f"{i}.png") as picture:
            assert labels.size == (64, 64)
            assert np.asarray(labels).max() < len(GROUND)
            assert picture.width > 64  # with its legend


def test_a_damaged_image_costs_none_before_it(detector, scenes, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes((scenes / "val" / "0.png").read_bytes())
    (folder / "b.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert main(["predict", str(folder), "--checkpoint", str(detector), "--save", str(out)]) == 1
    printed = capsys.readouterr()
    assert "b.png: not an image" in printed.err
    assert "1 of 2 images skipped" in printed.err
    assert len(json.loads((out / "objects.json").read_text())["images"]) == 1
    assert (out / "a.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("predict", ".", "--task", "detect"), "--task detect needs a trained network; give one with --checkpoint"),
        (("predict", ".", "--checkpoint", "{detector}", "--task", "segment"), "is for --task detect, not segment"),
        (("evaluate", "{detector}", "{segmenter}", "--data", "{scenes}"), "models of different tasks"),
        (("evaluate", "{segmenter}", "--data", "nowhere"), "nowhere: no such folder"),
        (("evaluate", "{detector}", "--data", "{scenes}", "--val_split", "some"), "no annotations found"),
    ],
)
def test_faults(detector, segmenter, scenes, tmp_path, monkeypatch, capsys, words, message):
    make_scene(0)[0].save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert main([word.format(detector=detector, segmenter=segmenter, scenes=scenes) for word in words]) == 2
    assert message in capsys.readouterr().err


def test_command_evaluates(detector, segmenter, scenes, capsys):
    assert main(["evaluate", str(detector), "--data", str(scenes), "--workers", "0", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["images"] == 3
    assert {"box_AP", "box_AP50", "mask_AP", "mask_APL"} <= row["measures"].keys()
    assert main(["evaluate", str(segmenter), str(segmenter), "--data", str(scenes), "--workers", "0", "--flip"]) == 0
    table = capsys.readouterr().out
    assert "mIoU, %" in table
    assert "IoU of ground, %" in table


def test_command_evaluates_where_a_class_is_nowhere(segmenter, scenes, capsys, monkeypatch):
    """JSON has null for its IoU, since it has no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    words = ["evaluate", str(segmenter), "--data", str(scenes), "--workers", "0"]
    monkeypatch.setattr(SegmentationMetrics, "iou", lambda self: torch.full((self.num_classes,), torch.nan))
    assert main([*words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert set(row["classes"].values()) == {None}
    assert row["measures"]["mIoU"] is not None
    assert main(words) == 0
    assert "none" in capsys.readouterr().out


def test_pictures():
    """Boxes in the classes' colours, masks and labels mixed with the image."""
    image, labels, _ = make_scene(0)
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 30:40, 30:40] = True
    drawn = draw_objects(image, dict(boxes=[[10, 20, 50, 60]], labels=[3], scores=[0.9], masks=mask), CLASSES)
    assert drawn.getpixel((10, 40)) == colour_of(2)
    assert drawn.getpixel((35, 35)) != image.getpixel((35, 35))
    assert drawn.getpixel((62, 62)) == image.getpixel((62, 62))
    coloured = np.asarray(draw_labels(image, torch.from_numpy(labels.astype(np.int64)) - 1, CLASSES), dtype=int)
    before = np.asarray(image, dtype=int)
    assert (coloured[labels == 0] == before[labels == 0]).all()
    place = np.argwhere(labels > 0)[0]
    expected = 0.4 * before[tuple(place)] + 0.6 * np.array(colour_of(int(labels[tuple(place)]) - 1))
    assert np.abs(coloured[tuple(place)] - expected).max() <= 1


def test_coco_results_with_the_ids_of_the_data(detector, scenes, tmp_path, capsys):
    """What evaluate saves is what COCO's own evaluation takes, to the same precision."""
    words = ("evaluate", str(detector), "--data", str(scenes), "--workers", "0", "--json")
    assert main([*words, "--save", str(tmp_path / "out")]) == 0
    measures = json.loads(capsys.readouterr().out)[0]["measures"]
    (results,) = (tmp_path / "out").glob("*_results.json")
    with (next((tmp_path / "out").glob("*_classes.csv"))).open() as file:
        assert [line.partition(",")[0] for line in file] == ["class", *CLASSES]
    truth = COCO(str(next(scenes.rglob("instances_val.json"))))
    for kind, name in (("bbox", "box_AP"), ("segm", "mask_AP")):
        scores = COCOeval(truth, truth.loadRes(str(results)), kind)
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
        assert scores.stats[0] == pytest.approx(measures[name] if measures[name] is not None else -1, abs=1e-6)


def test_evaluation_tells_what_was_skipped_by_its_exit_code(detector, segmenter, scenes, tmp_path, capsys):
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    next((data / "val").glob("*.png")).write_bytes(b"no image")
    words = ["evaluate", str(detector), "--data", str(data), "--workers", "0"]
    assert main(words) == 1
    assert "skipped" in capsys.readouterr().err
    assert main([*words, "--strict"]) == 2
    assert "not an image" in capsys.readouterr().err
    assert main([*words, "--batch_size", "0"]) == 2
    assert "--batch_size must be at least 1, got 0" in capsys.readouterr().err
    for name in ("classes", "labels", "window", "top", "ignore_index"):
        assert main([*words, f"--{name}", "0"]) == 2
    err = capsys.readouterr().err
    assert "--classes is for classifiers and segmenters; a detector takes --format, --annotations, --images" in err
    assert "--labels is for segmenters; a detector takes" in err
    assert "unknown option --top" in err
    assert "--ignore_index is for segmenters" in err
    assert main(["evaluate", str(segmenter), "--data", str(data), "--crop_pct", "0"]) == 2
    assert main(["evaluate", str(segmenter), "--data", str(data), "--image_size", "64"]) == 2
    assert "--image_size is for classifiers; a segmenter takes --classes, --labels" in capsys.readouterr().err


def test_evaluation_reads_label_maps_as_the_run_did(segmenter, scenes, tmp_path, capsys):
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    for path in data.glob("*annot/*.png"):
        Image.fromarray(40 * np.array(Image.open(path))).save(path)
    runs = [Path(shutil.copytree(segmenter, tmp_path / name)) for name in "ab"]
    words = ["--data", str(data), "--workers", "0", "--json"]
    labels = ",".join(str(40 * i) for i in range(len(GROUND)))
    assert main(["evaluate", str(runs[0]), *words, "--labels", labels]) == 0
    (given,) = json.loads(capsys.readouterr().out)
    for folder, own in zip(runs, (labels, None), strict=True):
        (folder / "config.yaml").write_text(yaml.safe_dump(dict(task="segment", data="somewhere", labels=own)))
    for model in (runs[0], runs[0] / MODEL_FILE):
        assert main(["evaluate", str(model), *words]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert row["measures"] == given["measures"]
        assert row["notes"][0] == f"label maps are read as in {model}: labels {labels}"
    assert main(["evaluate", *map(str, runs), *words]) == 2
    assert "these runs read label maps in different ways; say how with --labels" in capsys.readouterr().err
    assert main(["evaluate", str(runs[0]), *words, "--labels", labels, "--reduce_zero_label"]) == 2
    assert "labels says which values are classes, and so does reduce_zero_label" in capsys.readouterr().err
    (runs[0] / "config.yaml").write_text("task: segment\nnothing: 1\n")
    assert main(["evaluate", str(runs[0]), *words]) == 2
    assert "config.yaml: these are no settings of a run (unknown setting nothing" in capsys.readouterr().err
    assert main(["evaluate", str(runs[0]), *words, "--labels", labels]) == 0


def test_evaluation_tells_a_network_of_no_numbers(detector, segmenter, scenes, tmp_path, capsys):
    for run in (detector, segmenter):
        state = {n: w * torch.nan if w.is_floating_point() else w for n, w in load_file(run / MODEL_FILE).items()}
        save_model(tmp_path / MODEL_FILE, state, read_record(run / MODEL_FILE))
        assert main(["evaluate", str(tmp_path), "--data", str(scenes), "--workers", "0"]) == 2
        assert "the network's output is no finite number in fp32; check its weights" in capsys.readouterr().err


def test_detectors_and_segmenters_are_converted(detector, segmenter, tmp_path, capsys):
    for run, name in ((detector, "mask_rcnn on overlock_atto"), (segmenter, "upernet on overlock_atto")):
        target = tmp_path / f"{run.parent.name}.safetensors"
        assert main(["convert", str(run), str(target)]) == 0
        assert f"{name}, {len(read_record(target).classes)} classes" in capsys.readouterr().out
        assert read_record(target) == read_record(run / MODEL_FILE)
        before, after = load_file(run / MODEL_FILE), load_file(target)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
