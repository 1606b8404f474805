"""Runs of detectors and segmenters: their folders, resuming to the bit, first weights, tests over processes."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric import Fabric
from PIL import Image
from runs import assert_same, launch, run
from scenes import write_scenes

from overlock.checkpoints import HEADS, MODEL_FILE, Record, load_model, save_model, start_from
from overlock.deploy.evaluate import evaluate_by_task
from overlock.drawing import colour_of
from overlock.tasks.metrics import DetectionMetrics
from overlock.training import CONFIGS, DetectConfig, SegmentConfig, TrainConfig
from overlock.training.detection import make_job
from overlock.training.networks import make_network
from overlock.training.run import JOBS
from overlock.training.stop import RunStoppedError
from overlock.training.trainer import Trainer

SMALL = dict(
    model="overlock_atto",
    epochs=2,
    batch_size=2,
    optim=dict(lr=1e-3, base_batch_size=2, warmup_steps=2),
    runtime=dict(accelerator="cpu", workers=0),
    safety=dict(steps=2),
)
DETECT = dict(
    SMALL, task="detect", detector="mask_rcnn", min_size=64, max_size=64, hidden_channels=32, proposals=20, regions=8
)
SEGMENT = dict(SMALL, task="segment", hidden_channels=32, scale=(64, 64), crop=48)
TASKS = dict(detect=DETECT, segment=SEGMENT)


def settings(task, data, output, **changes):
    return CONFIGS[task].from_dict({**TASKS[task], "data": str(data), "output": str(output), **changes})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=6, val=3)


@pytest.fixture(scope="module", params=TASKS)
def trained(request, scenes, tmp_path_factory):
    """A task, and the folder of a run and what it printed."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, folder, run(settings(request.param, scenes, folder), curves=True)


def test_folder_of_a_run(trained, scenes):
    task, folder, printed = trained
    for name in ("config.yaml", "environment.json", "log.csv", "curves.png", "samples.png", "model.safetensors"):
        assert (folder / name).stat().st_size > 0
    config = CONFIGS[task].from_dict(yaml.safe_load((folder / "config.yaml").read_text()))
    assert config == settings(task, scenes, folder)
    name = dict(detect="mask_rcnn on overlock_atto", segment="upernet on overlock_atto")[task]
    assert f"{name}: " in printed
    assert "6 images to train on, 3 held out" in printed
    measure = dict(detect="box AP", segment="mIoU")[task]
    assert printed.count(f"test {measure}") == 3


def test_weights_score_as_the_log_says(trained, scenes):
    """Loaded anew, folded, and in batches of another size."""
    task, folder, _ = trained
    network, record = load_model(folder)
    assert record.task == task
    result = evaluate_by_task(network, record, str(scenes), name="it", batch_size=2, workers=0)
    names, *rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    logged = dict(zip(names, rows[-1], strict=True))
    assert result.images == 3
    for name, value in result.measures.items():
        assert value == pytest.approx(float(logged[name] or "nan"), abs=2e-3, nan_ok=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_score_alike_in_half_precision(trained, scenes, precision):
    _, folder, _ = trained
    whole = evaluate_by_task(*load_model(folder), str(scenes), name="it", workers=0).measures
    half = evaluate_by_task(*load_model(folder), str(scenes), name="it", workers=0, precision=precision).measures
    assert half.keys() == whole.keys()
    assert all(half[name] == pytest.approx(whole[name], abs=0.05, nan_ok=True) for name in whole)


def test_stopped_and_resumed_ends_in_the_same_bits(trained, scenes, tmp_path, monkeypatch):
    task, whole, _ = trained
    config = settings(task, scenes, tmp_path / "run")
    original, calls = Trainer.train_step, []

    def step(self, batches):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(self, batches)

    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(RunStoppedError):
        run(config)
    run(config, resume=True)
    assert_same(tmp_path / "run", whole)


def test_a_run_starts_from_a_classifier_or_another_dense_run(trained, scenes, tmp_path):
    task, folder, _ = trained
    network, record = load_model(folder)
    classes = ("one", "two", *record.classes)
    other = type(record)(model=record.model, head=record.head, classes=classes, model_args=record.model_args)
    config = settings(task, scenes, tmp_path, weights=str(folder))
    started, given = make_network(config, other), dict(network.named_parameters())
    taken = [name for name, p in started.named_parameters() if name in given and torch.equal(p, given[name])]
    assert all(name in taken for name in given if "backbone" in name)
    assert 0 < len(given) - len(taken) <= 12  # layers of classes alone
    wider = settings(task, scenes, tmp_path, model="overlock_nano", weights=str(folder))
    with pytest.raises(ValueError, match=r"on overlock_atto: the weights do not fit.*; set --model to its own"):
        make_network(wider, type(record)(model="overlock_nano", head=record.head, classes=classes))


@pytest.mark.parametrize("model", ["overlock_atto", "resnet18"])
@pytest.mark.parametrize(("first", "second"), [("faster_rcnn", "upernet"), ("upernet", "faster_rcnn")])
def test_the_backbone_of_another_task(first, second, model, tmp_path):
    """A segmenter starts from a detector's backbone, and a detector from a segmenter's."""
    roots = dict(faster_rcnn="backbone.body", upernet="backbone")
    narrow = dict(faster_rcnn=dict(hidden_channels=16), upernet=dict(hidden_channels=32))
    given, started = (HEADS[head](model, num_classes=3, **narrow[head]) for head in (first, second))
    record = Record(model=model, head=first, classes=("a", "b", "c"), model_args=narrow[first])
    save_model(tmp_path / MODEL_FILE, given.state_dict(), record)
    start_from(started, tmp_path / MODEL_FILE)
    theirs, ours = given.get_submodule(roots[first]).state_dict(), started.get_submodule(roots[second]).state_dict()
    assert any(name in theirs for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())


@pytest.mark.parametrize("model", ["overlock_atto", "convnext_atto", "resnet18"])
def test_a_classifiers_weights_go_into_the_backbone(model, scenes, tmp_path):
    import timm

    from overlock.checkpoints import default_preprocessing

    network = timm.create_model(model, num_classes=3)
    record = Record(
        model=model, classes=("a", "b", "c"), preprocessing=default_preprocessing(network, in_chans=3),
        model_args=dict(num_classes=3),
    )  # fmt: skip
    save_model(tmp_path / MODEL_FILE, network.state_dict(), record)
    own = dict(model=model, weights=str(tmp_path), detector="faster_rcnn")
    body = make_job(settings("detect", scenes, tmp_path / "run", **own)).network.backbone.body
    inner = getattr(body, "backbone", body).state_dict()
    given = {name.replace(".", "_"): tensor for name, tensor in network.state_dict().items()}
    assert all(torch.equal(tensor, given[name.replace(".", "_")]) for name, tensor in inner.items())


def test_parts_of_the_backbone_stay_as_they_are(scenes, tmp_path):
    config = settings("segment", scenes, tmp_path / "run", epochs=1, freeze=["base_net", "backbone.norms"])
    before = JOBS[config.task](config).network.state_dict()
    run(config)
    after = load_model(tmp_path / "run")[0].state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert not any("base_net" in name or "norms" in name for name in changed)
    assert any("focus_net" in name for name in changed)
    assert any("decode_head" in name for name in changed)


@pytest.mark.parametrize("detector", ["faster_rcnn", "cascade_rcnn", "cascade_mask_rcnn"])
def test_other_detectors(detector, scenes, tmp_path):
    config = settings("detect", scenes, tmp_path / "run", detector=detector, epochs=1, epoch_steps=2, batch_size=1)
    assert "1/1" in run(config)
    _, record = load_model(tmp_path / "run")
    assert (record.head, record.classes) == (detector, ("blue", "green", "red"))


def test_a_baseline_and_chosen_categories_and_scales(scenes, tmp_path):
    config = settings(
        "detect", scenes, tmp_path / "run", model="resnet18", epochs=1, epoch_steps=1, categories=["red", "blue"],
        multi_scale=[48, 64], detector="faster_rcnn", ema=dict(decay=0.5), drop_path=0.2,
    )  # fmt: skip
    run(config)
    network, record = load_model(tmp_path / "run")
    assert record.classes == ("blue", "red")
    for one in (network, JOBS["detect"](config).network):  # the loaded one would train on as the first did
        assert one.transform.min_size == (48, 64)  # each drawn as often as the other; the last is that of tests
        assert one.roi_heads.fg_bg_sampler.batch_size_per_image == config.regions
        assert one.rpn._pre_nms_top_n["training"] >= one.rpn._post_nms_top_n["training"] == config.proposals
        assert max(getattr(module, "drop_prob", 0) or 0 for module in one.modules()) == pytest.approx(0.2)


def test_scores_of_several_processes_are_joined():
    """What two processes have seen half of each scores as one that has seen all."""

    def some(seed):
        generator = torch.Generator().manual_seed(seed)
        corners = 40 * torch.rand(4, 2, generator=generator)
        boxes = torch.cat([corners, corners + 20], dim=1)
        labels = torch.randint(1, 3, (4,), generator=generator)
        masks = torch.zeros(4, 64, 64, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        moved = boxes + 3 * torch.rand(4, 4, generator=generator)
        scores = torch.rand(4, generator=generator)
        result = dict(boxes=moved, scores=scores, labels=labels, masks=masks[:, None].float())
        return [result], [dict(boxes=boxes, labels=labels, masks=masks)]

    whole, *parts = (DetectionMetrics(masks=True) for _ in range(3))
    for seed in range(5):
        whole.update(*some(seed))
        parts[seed % 2].update(*some(seed))
    joined = DetectionMetrics(masks=True)
    joined.merge([part.state() for part in parts])
    measures = whole.measures()
    assert joined.measures() == pytest.approx(measures, nan_ok=True)
    assert measures["box_AP"] > 0.2


def test_a_score_without_images_is_told(scenes, tmp_path):
    for task in TASKS:
        config = settings(task, scenes, tmp_path / task, epochs=1, epoch_steps=1)
        job = JOBS[task](config)
        measures = job.task.make_metrics().measures(Fabric(accelerator="cpu", devices=1))
        assert not measures[job.task.main_metric] >= 0


@pytest.mark.parametrize("left", ["nothing", "crowds"])
def test_nothing_to_find_in_the_test_part(left, scenes, tmp_path):
    """No measure, as itself and as a result: not -100 %, nor nan; the last weights stand for the best."""
    root = tmp_path / "data"
    shutil.copytree(scenes, root)
    content = json.loads((root / "instances_val.json").read_text())
    crowds = [dict(one, iscrowd=1) for one in content["annotations"]] if left == "crowds" else []
    (root / "instances_val.json").write_text(json.dumps(content | dict(annotations=crowds)))
    folder = tmp_path / "run"
    printed = run(settings("detect", root, folder, epoch_steps=1))
    assert printed.count("test box AP none") == 3
    texts = [printed, *((folder / name).read_text() for name in ("log.csv", "README.md"))]
    texts = [text.replace(str(tmp_path), "") for text in texts]  # whose number may be -100 too
    assert not any(re.search(r"\bnan\b|-1[.\d]*0|-100", text) for text in texts)
    assert "| box AP, % | none |" in texts[-1]
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [row["box_AP"] for row in rows] == ["", ""]
    last, best = (load_model(folder / name)[0].state_dict() for name in ("model.safetensors", "best.safetensors"))
    assert all(torch.equal(best[name], tensor) for name, tensor in last.items())


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        (DetectConfig, dict(min_size=2000), "min_size and multi_scale must be a finite number in 32 to 1333"),
        (DetectConfig, dict(multi_scale=[480, 640]), "multi_scale must have min_size 800"),
        (DetectConfig, dict(proposals=0), "proposals must be a finite number at least 1"),
        (DetectConfig, dict(image_size=3), "unknown setting image_size"),
        (SegmentConfig, dict(ratio=[0, 1]), "ratio must be a range above 0"),
        (SegmentConfig, dict(crop=3), "crop must be a finite number at least 32"),
        (SegmentConfig, dict(labels="0"), "labels must be the pixel values of two or more classes"),
        (
            SegmentConfig,
            dict(labels="0,255", reduce_zero_label=True),
            "labels says which values are classes, and so does reduce_zero_label",
        ),
        (TrainConfig, dict(optim=dict(schedule="multistep")), "milestones is what"),
        (TrainConfig, dict(epoch_steps=0), "epoch_steps must be"),
    ],
)
def test_refused_settings(kind, setting, message):
    with pytest.raises(ValueError, match=message):
        kind.from_dict({"data": "x", **setting})


def test_colours_of_classes_differ():
    assert len({colour_of(label) for label in range(150)}) == 150


@pytest.fixture
def odd_scenes(scenes, tmp_path):
    """Images of several shapes, one without objects, objects of a pixel, thin, outside, crowded, and without masks."""
    root = tmp_path / "odd"
    shutil.copytree(scenes, root)
    draw = np.random.default_rng(0)
    sizes = {0: (64, 64), 1: (64, 200), 2: (230, 64), 3: (97, 65), 4: (64, 64), 5: (100, 100)}
    for place, size in sizes.items():
        Image.fromarray(draw.integers(0, 255, (*size, 3), np.uint8)).save(root / "train" / f"{place}.png")
    crowd = dict(size=[64, 200], counts=[100, 500, 12200])
    objects = [
        (0, [10, 10, 1, 1], [[10, 10, 11, 10, 11, 11, 10, 11]], 0),  # a pixel
        (0, [5, 5, 2, 2], [[5, 5, 7, 5, 7, 7, 5, 7]], 0),  # less than the stride
        (1, [0, 0, 200, 1], [[0, 0, 200, 0, 200, 1, 0, 1]], 0),  # a line
        (1, [20, 20, 60, 40], crowd, 1),
        (2, [60, 200, 100, 100], [], 0),  # beyond the image, without a mask
        (3, [300, 300, 5, 5], [], 0),  # outside
        (4, [3, 3, 0, 0], [], 0),  # of no size
        (5, [0, 0, 100, 100], [[0, 0, 100, 0, 100, 100, 0, 100]], 0),
    ]
    for part in ("train", "val"):
        content = json.loads((root / f"instances_{part}.json").read_text())
        content["images"] = [
            dict(id=i, file_name=f"{i}.png", height=height, width=width) for i, (height, width) in sizes.items()
        ]
        content["annotations"] = [
            dict(id=k, image_id=i, category_id=10, bbox=box, area=box[2] * box[3], segmentation=shape, iscrowd=many)
            for k, (i, box, shape, many) in enumerate(objects)
        ]
        (root / f"instances_{part}.json").write_text(json.dumps(content))
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train", root / "val")
    return root


@pytest.mark.parametrize("detector", ["mask_rcnn", "cascade_mask_rcnn"])
def test_odd_objects(detector, odd_scenes, tmp_path):
    """Trains without a step skipped, and scores, among them images without objects."""
    config = settings(
        "detect", odd_scenes, tmp_path / "run", detector=detector, epochs=1, max_size=256, background=True
    )
    printed = run(config)
    assert "skipped" not in printed
    assert not (tmp_path / "run" / "unreadable.txt").exists()
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert len(rows) == 2
    assert "6 images to train on, 6 held out" in printed
    for reason in (
        "1 of 8 objects left out: their boxes have no area",
        "1 of 8 objects left out: they lie outside of their images",
        "1 of 6 objects left out: crowds are not learnt from",
        "2 of 6 images have no object",
    ):
        assert f"instances_train.json: {reason}\n" in printed


def test_masks_of_0_and_255(scenes, tmp_path):
    """Refused before anything is written; learnt from where the values are named, which the run's settings keep."""
    root = tmp_path / "data"
    shutil.copytree(scenes, root)
    for path in root.glob("*annot/*.png"):
        Image.fromarray(np.where(np.array(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)
    (root / "classes.txt").write_text("ground\nsquare")
    with pytest.raises(
        ValueError, match=r"trainannot: the label maps have the values 0 and 255 alone, .* --labels 0,255"
    ):
        run(settings("segment", root, tmp_path / "run", epochs=1))
    assert not (tmp_path / "run").exists()
    printed = run(settings("segment", root, tmp_path / "run", epochs=1, labels="0,255"))
    table = (tmp_path / "run" / "notes.txt").read_text()
    assert "share of pixels, %, in 6 of 6 and 3 of 3 label maps" in table
    assert table.strip() in printed
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert SegmentConfig.from_dict(kept).label_files.values == (0, 255)
    files = SegmentConfig.from_dict(kept).label_files
    result = evaluate_by_task(*load_model(tmp_path / "run"), files, name="run", workers=0)
    assert min(result.measures.values()) > 0


def test_labels_out_of_range_are_told_and_counted(scenes, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(scenes, root)
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(root / "trainannot" / "3.png")
    run(settings("segment", root, tmp_path / "run", epochs=1))
    (line,) = (tmp_path / "run" / "unreadable.txt").read_text().splitlines()
    assert re.search(r"3\.png: a label is 9, where classes go from 0 to 3 and 255 is ignored", line)
    for i in range(6):
        Image.fromarray(np.full((64, 64), 9, np.uint8)).save(root / "trainannot" / f"{i}.png")
    sentence = r"6 of 6 label maps have values that are no class, such as 9 .* where classes go from 0 to 3"
    with pytest.raises(ValueError, match=sentence):
        run(settings("segment", root, tmp_path / "again", epochs=1))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("task", TASKS)
def test_half_precision(task, precision, scenes, tmp_path):
    config = settings(task, scenes, tmp_path / "run", epochs=1, runtime=dict(SMALL["runtime"], precision=precision))
    run(config)
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert math.isfinite(float(rows[0]["loss"]))
    if precision == "bf16":
        assert rows[0]["skipped"] == "0"


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes(strategy, task, scenes, tmp_path):
    """Train with norms over both, test half of the images each, and score as one process does."""
    runtime = dict(accelerator="cpu", workers=0, strategy=strategy)
    config = settings(task, scenes, tmp_path / "run", epochs=1, batch_size=4, runtime=runtime)
    process = launch(tmp_path, config)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    names, row = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()]
    logged = dict(zip(names, row, strict=True))
    result = evaluate_by_task(*load_model(tmp_path / "run"), str(scenes), name="it", workers=0)
    for name, value in result.measures.items():
        assert value == pytest.approx(float(logged[name] or "nan"), abs=2e-3, nan_ok=True)
