"""Overfit check: each head learns four real images until it finds all that is in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from runs import run

from overlock.checkpoints import load_model
from overlock.deploy.evaluate import evaluate_by_task
from overlock.training import CONFIGS

CELLS = ("BloodImage_00010", "BloodImage_00034", "BloodImage_00043", "BloodImage_00070")
STREETS = ("0001TP_006930", "0001TP_008010", "0001TP_008460", "0016E5_06510")
LEAST_AREA = 3000  # of an object in pixels; what is smaller is left out
SIDE = 256  # of the squares that a segmenter learns, in pixels
# Of each head: its data, its steps, and what it must reach.
HEADS = {
    "faster_rcnn": (CELLS, 400, ("box_AP",)),
    "cascade_rcnn": (CELLS, 400, ("box_AP",)),
    "mask_rcnn": (STREETS, 400, ("box_AP", "mask_AP")),
    "cascade_mask_rcnn": (STREETS, 400, ("box_AP", "mask_AP")),
    "upernet": (STREETS, 1500, ("mIoU",)),  # poles of a few pixels' width take longest
}


def take_four(source: Path, names: tuple[str, ...], root: Path) -> Path:
    """Four images of a data set and their large objects, to train on and to test on."""
    root.mkdir()
    content = json.loads((source / "instances_train.json").read_text())
    content["images"] = [image for image in content["images"] if Path(image["file_name"]).stem in names]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [
        one for one in content["annotations"] if one["image_id"] in kept and one["area"] >= LEAST_AREA
    ]
    for part in ("train", "val"):
        (root / f"instances_{part}.json").write_text(json.dumps(content))
        for folder, suffix in ((part, ".jpg"), (f"{part}annot", ".png")):
            origin = source / folder.replace("val", "train")
            if origin.is_dir():
                (root / folder).mkdir()
                for name in names:
                    shutil.copy(origin / f"{name}{suffix}", root / folder)
    shutil.copy(source / "classes.txt", root)
    return root


def cut_squares(root: Path) -> None:
    """Cut images and maps to their middle, so that what is learnt and what is tested are of one form and scale."""
    for path in (*root.glob("*/*.jpg"), *root.glob("*/*.png")):
        with Image.open(path) as image:
            left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
            cut = image.crop((left, top, left + SIDE, top + SIDE))
        cut.save(path, quality=95)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("head", HEADS)
def test_overfits_four_images(head, shared_data, tmp_path):
    names, steps, wanted = HEADS[head]
    data = take_four(shared_data / ("bccd" if names is CELLS else "camvid"), names, tmp_path / "data")
    common = dict(
        data=str(data), output=str(tmp_path / "run"), model="overlock_atto", epochs=1, epoch_steps=steps, batch_size=4,
        optim=dict(lr=1e-3, base_batch_size=4, warmup_steps=20, weight_decay=0.0), runtime=dict(workers=0),
    )  # fmt: skip
    if head == "upernet":
        cut_squares(data)
        own = dict(hidden_channels=64, scale=(SIDE, SIDE), ratio=(1.0, 1.0), crop=SIDE)
        config = CONFIGS["segment"].from_dict({**common, **own})
    else:
        own = dict(detector=head, min_size=240, max_size=320, hidden_channels=64, proposals=100, regions=32)
        config = CONFIGS["detect"].from_dict({**common, **own})
    run(config)
    result = evaluate_by_task(*load_model(tmp_path / "run"), str(data), name=head, workers=0)
    for measure in wanted:
        assert result.measures[measure] > 0.9, result.measures
