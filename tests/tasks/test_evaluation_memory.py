"""The memory that the evaluation of a large photograph with many masks takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

SIZE, OBJECTS = (3000, 4000), 100
SCRIPT = """
import resource, sys
import torch
from overlock.checkpoints import HEADS, Record
from overlock.deploy.evaluate import evaluate_by_task

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB on Linux

torch.set_num_threads(2)
torch.manual_seed(0)
sizes = dict(min_size=240, max_size=320, hidden_channels=32)
network = HEADS["mask_rcnn"]("overlock_atto", num_classes=2, **sizes)
record = Record(model="overlock_atto", head="mask_rcnn", classes=("blob", "spot"), model_args=sizes)
evaluate_by_task(network, record, sys.argv[1], name="small", workers=0, device="cpu")
before = peak()
result = evaluate_by_task(network, record, sys.argv[2], name="large", workers=0, device="cpu", keep_found=True)
print(len(result.found), peak() - before)
"""


def write_blobs(root, size):
    """One image with circles over all of it, in COCO's form."""
    root.mkdir()
    height, width = size
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize((width, height)).save(
        root / "it.jpg"
    )
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    annotations = []
    for number in range(OBJECTS):
        radius, x, y = min(size) / 10, *draw.uniform(0.1, 0.9, 2) * (width, height)
        corners = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1).round(1)
        annotations.append(
            dict(
                id=number + 1, image_id=1, category_id=1 + number % 2, iscrowd=0, area=np.pi * radius**2,
                bbox=[x - radius, y - radius, 2 * radius, 2 * radius], segmentation=[corners.ravel().tolist()],
            )
        )  # fmt: skip
    content = dict(
        images=[dict(id=1, file_name="it.jpg", width=width, height=height)], annotations=annotations,
        categories=[dict(id=1, name="blob"), dict(id=2, name="spot")],
    )  # fmt: skip
    (root / "_annotations.coco.json").write_text(json.dumps(content))
    return root


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory as Linux counts it")
def test_masks_of_a_large_photograph(tmp_path, record_property):
    """Less than 600 MB, what copies of the image take, 144 MB each as floats; its masks as pixels would take 2400."""
    folders = [str(write_blobs(tmp_path / name, size)) for name, size in (("small", (300, 400)), ("large", SIZE))]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, more = done.stdout.split()[-2:]
    record_property("megabytes", more)
    assert int(found) == OBJECTS
    assert float(more) < 600
