"""Detectors on small backbones: torchvision's own figures where they are set up alike, and images of all kinds."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import images, randomise
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align

from overlock.detection import cascade_mask_rcnn, cascade_rcnn, faster_rcnn, mask_rcnn
from overlock.tasks.cascade import CascadeHeads, CascadeStage
from overlock.tasks.detection import AlignedRoIAlign, ExactAnchors, PyramidBackbone
from overlock.tasks.features import make_features

BUILDERS = {f.__name__: f for f in (faster_rcnn, mask_rcnn, cascade_rcnn, cascade_mask_rcnn)}
CLASSES = 3


def build(name, *, seed=0, size=64, **options):
    """With few regions for the heads, which cost most of the time."""
    torch.manual_seed(seed)
    few = dict(min_size=size, max_size=4 * size, proposals=20, regions=8)
    return BUILDERS[name]("overlock_atto", num_classes=CLASSES, **few, **options)


def target(boxes, size, labels=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    labels = [1 + i % CLASSES for i in range(len(boxes))] if labels is None else labels
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}


def scene(seed=0):
    """Two images of different size, with three objects and one."""
    pictures = [images(1, 3, 96, 128, seed=seed)[0], images(1, 3, 80, 64, seed=seed + 1)[0]]
    objects = [[[4, 8, 60, 70], [50, 20, 120, 90], [70, 5, 90, 30]], [[10, 10, 50, 60]]]
    return pictures, [target(x, p.shape[1:]) for p, x in zip(pictures, objects, strict=True)]


def losses_of(model, seed=0, **kwargs):
    torch.manual_seed(seed)  # of the samplers
    pictures, targets = scene()
    return model.train()(pictures, targets, **kwargs)


def check_alike(ours, theirs):
    """The same losses and the same detections."""
    actual, expected = losses_of(ours), losses_of(theirs)
    assert len(actual) == len(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual.get(name, actual.get(f"{name}_1")), value, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        pairs = zip(ours.eval()(scene()[0]), theirs.eval()(scene()[0]), strict=True)
    for mine, other in pairs:
        assert len(mine["boxes"]) > 0
        for name, value in other.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-4)


# Parts


def test_regions_have_the_half_pixel_shift_and_come_from_the_level_of_their_size():
    maps = {str(i): images(2, 5, 256 // stride, 320 // stride, seed=i) for i, stride in enumerate((4, 8, 16, 32))}
    boxes = [torch.tensor([[0.0, 0, 40, 50], [10, 20, 130, 140], [3, 3, 250, 250]]), torch.tensor([[1.0, 2, 310, 250]])]
    pooled = AlignedRoIAlign(7)(maps, boxes, [(256, 320)] * 2)
    place = 0
    for image, group in enumerate(boxes):
        for box in group:
            side = math.sqrt(float((box[2] - box[0]) * (box[3] - box[1])))
            level = min(3, max(0, math.floor(4 + math.log2(side / 224)) - 2))
            region = torch.cat([torch.tensor([float(image)]), box])[None]
            expected = roi_align(maps[str(level)], region, 7, 1 / (4 * 2**level), sampling_ratio=-1, aligned=True)
            torch.testing.assert_close(pooled[place], expected[0])
            place += 1


def test_no_regions():
    maps = {str(i): images(1, 5, 64 >> i, 64 >> i) for i in range(4)}
    assert AlignedRoIAlign(7)(maps, [torch.empty(0, 4)], [(256, 256)]).shape == (0, 5, 7, 7)


def test_anchors_are_not_rounded():
    for stride, anchors in zip((4, 8, 16, 32, 64), ExactAnchors().cell_anchors, strict=True):
        width, height = (anchors[:, 2:] - anchors[:, :2]).T
        torch.testing.assert_close(width * height, torch.full((3,), float((8 * stride) ** 2)))
        torch.testing.assert_close(height / width, torch.tensor([0.5, 1, 2]))
        torch.testing.assert_close(anchors[:, :2], -anchors[:, 2:])


# Whole models


@torch.no_grad()
def sharpen(model):
    """Heads that tell one box from another, so that detections are more than ties."""
    for name, parameter in model.roi_heads.named_parameters():
        if "predictor" in name or "fc" in name:
            parameter.mul_(3)
    return model


def test_agrees_with_torchvision_set_up_alike():
    """With its anchors and regions in the place of ours."""
    torch.manual_seed(0)
    theirs = MaskRCNN(
        PyramidBackbone(*make_features("overlock_atto", overview=True)[:2]), CLASSES + 1, min_size=64, max_size=256,
        rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20, box_batch_size_per_image=8,
    )  # fmt: skip
    randomise(theirs.backbone)
    ours = build("mask_rcnn", seed=1)
    ours.load_state_dict(sharpen(theirs).state_dict())
    ours.rpn.anchor_generator = theirs.rpn.anchor_generator
    ours.roi_heads.box_roi_pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    ours.roi_heads.mask_roi_pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2)
    check_alike(ours, theirs)


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn"])
def test_a_cascade_of_one_stage_is_the_detector(name):
    theirs, ours = sharpen(build(name)), build(name)
    heads = theirs.roi_heads
    parts = {
        part: getattr(heads, part)
        for kind in ("box", "mask")
        for part in (f"{kind}_roi_pool", f"{kind}_head", f"{kind}_predictor")
    }
    stage = CascadeStage(
        giou=False, fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=8, positive_fraction=0.25,
        bbox_reg_weights=None, score_thresh=0.05, nms_thresh=0.5, detections_per_img=100, **parts,
    )  # fmt: skip
    ours.backbone, ours.rpn = theirs.backbone, theirs.rpn
    ours.roi_heads = CascadeHeads([stage], [1.0])
    check_alike(ours, theirs)


def test_stages_refine_boxes():
    """A shift that leads to an object does so, of the class of the object and no other."""
    stage = cascade_rcnn("overlock_atto", num_classes=CLASSES).roi_heads.stages[1]
    boxes, wanted = torch.tensor([[10.0, 10, 50, 40]]), torch.tensor([[14.0, 8, 60, 44]])
    shifts = torch.zeros(1, CLASSES + 1, 4)
    shifts[:, 2] = stage.box_coder.encode([wanted], [boxes])[0]
    logits = torch.tensor([[5.0, 0, 1, 0]])
    for labels in (torch.tensor([2]), torch.tensor([0]), None):
        (refined,) = stage.refine([boxes], logits, shifts.flatten(1), [(100, 100)], labels)
        torch.testing.assert_close(refined, wanted)
    (still,) = stage.refine([boxes], logits, shifts.flatten(1), [(100, 100)], torch.tensor([1]))
    torch.testing.assert_close(still, boxes)
    loss = stage.box_loss(boxes, shifts.flatten(1), torch.tensor([2]), shifts[:, 2])
    assert float(loss) == pytest.approx(0, abs=1e-4)
    off = stage.box_loss(boxes, torch.zeros(1, 4 * CLASSES + 4), torch.tensor([2]), shifts[:, 2])
    hull = (60 - 10) * (44 - 8)
    overlap = box_iou(boxes, wanted)
    union = 40 * 30 + 46 * 36 - (50 - 14) * (40 - 10)
    assert float(off) == pytest.approx(10 * (1 - float(overlap) + (hull - union) / hull), rel=1e-4)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        pytest.param(size, name, marks=pytest.mark.slow if "cascade" in name and size != (65, 200) else ())
        for size in [(64, 64), (65, 200), (230, 70)]
        for name in BUILDERS
    ],
)
def test_sizes_and_objects_of_all_kinds(name, size):
    """No object, one of one pixel, some: every loss and gradient finite, detections inside the image."""
    model = build(name)
    pictures = [images(1, 3, *size, seed=i)[0] for i in range(3)]
    height, width = size
    targets = [
        target([], size),
        target([[5, 6, 6, 7]], size),
        target([[0, 0, width, height], [3, 3, 40, 50]], size),
    ]
    losses = model.train()(pictures, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) > 0.9 * len(list(model.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    with torch.no_grad():
        for result in sharpen(model).eval()(pictures):
            boxes = result["boxes"]
            assert (boxes >= 0).all()
            assert (boxes[:, 2] <= width).all()
            assert (boxes[:, 3] <= height).all()
            assert ("masks" in result) == ("mask" in name)
            if "mask" in name:
                assert result["masks"].shape == (len(boxes), 1, *size)


@pytest.mark.parametrize("name", BUILDERS)
def test_only_empty_images(name):
    losses = build(name).train()([images(1, 3, 64, 96)[0]], [target([], (64, 96))])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("backbone", ["convnext_atto", "resnet10t"])
def test_other_backbones(backbone):
    """Of timm's: of four features and of five."""
    model = faster_rcnn(backbone, num_classes=2, min_size=64, max_size=128).eval()
    with torch.no_grad():
        assert set(model([images(1, 3, 64, 70)[0]])[0]) == {"boxes", "scores", "labels"}


@pytest.mark.parametrize(
    ("backbone", "classes", "message"),
    [
        ("overlock_tt", 2, "unknown backbone 'overlock_tt'; there are overlock_"),
        ("vit_tiny_patch16_224", 2, "gives no features at strides 4, 8, 16 and 32: it has 16"),
        ("overlock_atto", 0, "num_classes must be at least 1"),
    ],
)
@pytest.mark.parametrize("name", BUILDERS)
def test_what_cannot_be_built(name, backbone, classes, message):
    with pytest.raises(ValueError, match=message):
        BUILDERS[name](backbone, num_classes=classes)


def test_a_faster_rcnn_is_torchvision_s():
    assert isinstance(build("cascade_mask_rcnn"), FasterRCNN)
