"""The pipelines of detection and segmentation: sizes, and that boxes, masks and labels follow the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from overlock.data.detection_transforms import make_detection_transform
from overlock.data.segmentation_transforms import VariedCrop, make_segmentation_transform


def scene(height=300, width=400):
    """An image whose red is the label of each pixel, times 20, and the labels."""
    labels = np.add.outer(np.arange(height) // 60, np.arange(width) // 80)
    picture = np.repeat((20 * labels)[:, :, None], 3, axis=2).astype(np.uint8)
    return Image.fromarray(picture), tv_tensors.Mask(torch.from_numpy(labels))


@pytest.mark.parametrize("size", [(300, 400), (40, 700), (64, 64)])
def test_training_crops_of_segmentation(size):
    """A square of image and labels; what was added is ignored."""
    torch.manual_seed(0)
    for _ in range(4):
        image, labels = make_segmentation_transform(training=True, crop=128, scale=(256, 128))(*scene(*size))
        assert image.shape == (3, 128, 128)
        assert labels.shape == (128, 128)
        assert set(labels.unique().tolist()) <= {*range(12), *range(12, 25), -1}
        assert labels.dtype == torch.int64


def test_labels_follow_the_image():
    """Where the colours are undistorted, red tells the label."""
    torch.manual_seed(0)
    transform = make_segmentation_transform(training=True, crop=160, scale=(400, 300), ratio=(1.0, 1.0))
    transform.transforms = [step for step in transform.transforms if "Photometric" not in type(step).__name__]
    for _ in range(5):
        image, labels = transform(*scene())
        red = (image[0] * 0.229 + 0.485) * 255 / 20
        known = labels != -1
        assert ((red - labels).abs()[known] < 0.1).float().mean() > 0.97


def test_evaluation_keeps_the_labels_and_the_aspect():
    image, labels = make_segmentation_transform(training=False, scale=(200, 90))(*scene())
    assert image.shape == (3, 90, 120)
    assert labels.shape == (300, 400)


def test_varied_crops():
    """Hardly ever all of one class, where a corner has another."""
    labels = torch.zeros(200, 200, dtype=torch.int64)
    labels[:, 150:] = 1
    torch.manual_seed(0)
    shares = []
    for _ in range(30):
        cropped = VariedCrop(64)(tv_tensors.Mask(labels))
        assert cropped.shape == (64, 64)
        shares.append(float((cropped == 0).float().mean()))
    plain = [float((labels[:64, x : x + 64] == 0).float().mean()) for x in range(137)]
    assert np.mean(np.array(shares) == 1) < 0.5 * np.mean(np.array(plain) == 1)


def objects(boxes, size):
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return dict(
        boxes=tv_tensors.BoundingBoxes(torch.tensor(boxes, dtype=torch.float32), format="XYXY", canvas_size=size),
        labels=torch.arange(1, len(boxes) + 1),
        iscrowd=torch.zeros(len(boxes), dtype=torch.int64),
        area=torch.ones(len(boxes)),
        image_id=3,
        masks=tv_tensors.Mask(masks),
    )


def test_detection_in_a_test_is_the_image_itself():
    image, _ = scene()
    tensor, target = make_detection_transform(training=False)(image, objects([[10, 20, 60, 80]], (300, 400)))
    assert tensor.shape == (3, 300, 400)
    assert float(tensor.max()) <= 1
    assert target["boxes"].tolist() == [[10, 20, 60, 80]]


@pytest.mark.parametrize("crop", [False, True])
def test_boxes_and_masks_follow_the_image(crop):
    """A mask still fills its box; what has been cut away is gone from boxes, masks and labels alike."""
    image, _ = scene()
    transform, counts = make_detection_transform(training=True, crop=crop), []
    for seed in range(12):
        torch.manual_seed(seed)
        tensor, target = transform(
            image, objects([[10, 20, 60, 80], [200, 100, 390, 290], [5, 250, 30, 295]], (300, 400))
        )
        height, width = tensor.shape[1:]
        if crop:
            assert min(height, width) in (300, *range(384, 601))
        assert len(target["boxes"]) == len(target["masks"]) == len(target["labels"]) == len(target["area"])
        counts.append(len(target["labels"]))
        for mask, box in zip(target["masks"], target["boxes"], strict=True):
            left, top, right, bottom = box.tolist()
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert float(mask.sum()) == pytest.approx((right - left) * (bottom - top), rel=0.1, abs=40)
    assert max(counts) == 3
    if crop:
        assert min(counts) < 3
