"""Scores against a plain computation and against pycocotools used by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from overlock.tasks.metrics import DetectionMetrics, SegmentationMetrics


def draw_labels(count=3, classes=5, size=(20, 30), seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes - 1, (count, *size), generator=generator)  # the last class is nowhere
    predicted = torch.where(torch.rand(labels.shape, generator=generator) < 0.6, labels, (labels + 1) % (classes - 1))
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = -1
    return predicted, labels


def test_segmentation():
    """Class by class, and in parts as all at once."""
    predicted, labels = draw_labels()
    score, counted = SegmentationMetrics(5), labels != -1
    for one, other in zip(predicted, labels, strict=True):
        score.update(one, other)
    ious, accuracies = [], []
    for c in range(4):
        both = ((predicted == c) & (labels == c)).sum().item()
        either = (((predicted == c) | (labels == c)) & counted).sum().item()
        ious.append(both / either)
        accuracies.append(both / (labels == c).sum().item())
    measures = score.measures()
    assert measures["mIoU"] == pytest.approx(np.mean(ious))
    assert measures["mAcc"] == pytest.approx(np.mean(accuracies))
    assert measures["aAcc"] == pytest.approx(float((predicted == labels)[counted].double().mean()))
    assert score.iou()[:4].tolist() == pytest.approx(ious)
    assert math.isnan(score.iou()[4])


def test_segmentation_of_nothing_and_of_what_is_no_class():
    score = SegmentationMetrics(3)
    score.update(torch.zeros(4, dtype=torch.long), torch.full((4,), -1))
    assert math.isnan(score.measures()["mIoU"])
    with pytest.raises(ValueError, match="a label is 3, where classes go from 0 to 2 and -1 is ignored"):
        score.update(torch.zeros(2, dtype=torch.long), torch.tensor([3, 1]))
    with pytest.raises(ValueError, match="predictions of shape"):
        score.update(torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long))


def make_scene(count=6, size=(120, 160), seed=0):
    """Targets of all sizes, a crowd, an image without objects; and results near them, beside them and double."""
    generator = np.random.default_rng(seed)
    results, targets = [], []
    for image in range(count):
        objects = 0 if image == 2 else generator.integers(1, 7)
        corners = generator.uniform(0, (70, 50), (objects, 2))
        sides = generator.uniform(4, (90, 70), (objects, 2))
        boxes = inside(np.concatenate([corners, corners + sides], axis=1), size)
        found = inside(np.concatenate([boxes + generator.normal(0, 4, boxes.shape), boxes[:1] + 25]), size)
        labels = generator.integers(1, 4, objects)
        guesses = np.concatenate([labels, labels[:1] if objects else []])[: len(found)]
        if len(guesses) < len(found):
            guesses = np.ones(len(found))
        targets.append(
            dict(
                boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                labels=torch.tensor(labels, dtype=torch.int64),
                masks=fill(boxes, size),
                iscrowd=torch.tensor([int(image == 4 and i == 0) for i in range(objects)], dtype=torch.int64),
            )
        )
        results.append(
            dict(
                boxes=torch.tensor(found, dtype=torch.float32).reshape(-1, 4),
                scores=torch.tensor(generator.uniform(0.1, 1, len(found)), dtype=torch.float32),
                labels=torch.tensor(guesses, dtype=torch.int64),
                masks=fill(found, size)[:, None].float(),
            )
        )
    return results, targets


def inside(boxes, size):
    """Whole boxes of two pixels or more, so that a mask has its box's area."""
    height, width = size
    boxes = boxes.round().clip(0, (width - 2, height - 2, width, height))
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
    return boxes


def fill(boxes, size):
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
        mask[top:bottom, left:right] = 1
    return masks


def by_hand(results, targets, kind):
    """pycocotools itself, on files as COCO has them."""

    def encoded(mask):
        return rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))

    def as_coco(item, image, crowd):
        rows = []
        for i, (box, label) in enumerate(zip(item["boxes"].tolist(), item["labels"].tolist(), strict=True)):
            left, top, right, bottom = box
            mask = item["masks"][i].reshape(item["masks"].shape[-2:])
            area = float(mask.sum()) if kind == "segm" else (right - left) * (bottom - top)
            rows.append(
                dict(
                    image_id=image, category_id=label, bbox=[left, top, right - left, bottom - top], area=area,
                    segmentation=encoded(mask), iscrowd=int(item["iscrowd"][i]) if crowd else 0,
                )
            )  # fmt: skip
            if not crowd:
                rows[-1]["score"] = float(item["scores"][i])
        return rows

    truth = COCO()
    rows = [row for i, target in enumerate(targets) for row in as_coco(target, i, True)]
    height, width = targets[0]["masks"].shape[1:]
    truth.dataset = dict(
        images=[dict(id=i, height=height, width=width) for i in range(len(targets))],
        categories=[dict(id=i) for i in (1, 2, 3)],
        annotations=[dict(row, id=i + 1) for i, row in enumerate(rows)],
    )
    truth.createIndex()
    found = [row for i, result in enumerate(results) for row in as_coco(result, i, False)]
    if kind == "bbox":
        for row in found:
            del row["segmentation"]
    evaluation = COCOeval(truth, truth.loadRes(found), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[:6]


def test_detection():
    """Box and mask figures to 1e-4."""
    results, targets = make_scene()
    score = DetectionMetrics(masks=True)
    score.update(results[:2], targets[:2])
    score.update(results[2:], targets[2:])
    measures = score.measures()
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        expected = by_hand(results, targets, kind)
        actual = [measures[f"{name}_AP{part}"] for part in ("", "50", "75", "S", "M", "L")]
        expected = [share if share >= 0 else math.nan for share in expected.tolist()]
        assert actual == pytest.approx(expected, abs=1e-4, nan_ok=True)
        assert 0.05 < actual[0] < 0.95


def test_boxes_alone():
    results, targets = make_scene(seed=1)
    score = DetectionMetrics()
    score.update(results, targets)
    measures = score.measures()
    assert set(measures) == {f"box_AP{part}" for part in ("", "50", "75", "S", "M", "L")}
    assert measures["box_AP"] == pytest.approx(by_hand(results, targets, "bbox")[0], abs=1e-4)


def test_classes_by_themselves():
    """Each class's precision is what pycocotools gives for its objects alone, and their mean is the whole's."""
    results, targets = make_scene(seed=2)
    score = DetectionMetrics(masks=True, by_class=True)
    score.update(results, targets)
    measures, by_class = score.measures(), score.class_measures()
    assert by_class.keys() == {"box_AP", "mask_AP"}
    for kind, name in (("bbox", "box_AP"), ("segm", "mask_AP")):
        assert np.nanmean(list(by_class[name].values())) == pytest.approx(measures[name], abs=1e-6)
        for label, share in by_class[name].items():
            only = [[pick(one, one["labels"] == label) for one in part] for part in (results, targets)]
            expected = by_hand(*only, kind)[0]
            assert share == pytest.approx(expected, abs=1e-4) if expected >= 0 else math.isnan(share)


def pick(item, chosen):
    return {name: part[chosen] for name, part in item.items()}


@pytest.mark.parametrize("left", ["nothing", "crowds"])
@pytest.mark.parametrize("masks", [False, True])
def test_nothing_to_find_is_no_measure(left, masks):
    results, targets = make_scene(seed=3)
    if left == "nothing":
        targets = [pick(one, torch.zeros(len(one["labels"]), dtype=torch.bool)) for one in targets]
    else:
        targets = [one | dict(iscrowd=torch.ones_like(one["labels"])) for one in targets]
    score = DetectionMetrics(masks=masks, by_class=True)
    score.update(results, targets)
    assert all(math.isnan(share) for share in score.measures().values())
    assert all(math.isnan(share) for shares in score.class_measures().values() for share in shares.values())


def test_a_class_without_objects_is_left_out_of_the_mean():
    results, targets = make_scene(seed=4)
    targets = [pick(one, one["labels"] != 2) for one in targets]
    score = DetectionMetrics(by_class=True)
    score.update(results, targets)
    shares = score.class_measures()["box_AP"]
    assert math.isnan(shares[2])
    assert score.measures()["box_AP"] == pytest.approx((shares[1] + shares[3]) / 2, abs=1e-6)


def test_nothing_found_is_zero():
    _, targets = make_scene(seed=5)
    height, width = targets[0]["masks"].shape[1:]
    nothing = dict(
        boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, 1, height, width),
    )  # fmt: skip
    score = DetectionMetrics(masks=True, by_class=True)
    score.update([nothing] * len(targets), targets)
    assert score.measures()["box_AP"] == score.measures()["mask_AP"] == 0
    assert set(score.class_measures()["mask_AP"].values()) == {0.0}


def test_a_score_of_no_image():
    score = DetectionMetrics(masks=True, by_class=True)
    score.merge([score.state()])
    assert math.isnan(score.measures()["box_AP"])
    assert score.class_measures() == {"box_AP": {}, "mask_AP": {}}
