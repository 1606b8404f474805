"""benchmarks/losses.py at a small size: training by the kernels gives plain PyTorch's losses."""

from __future__ import annotations

import sys

import pytest
from bare import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from losses import compare, differences, load_batches

pytest.importorskip("numba")


@pytest.mark.slow
def test_losses_agree(shared_data):
    """In bfloat16 the two forms round at different places, by 2**-9 of each number."""
    images = shared_data / "cifar10" / "test.npz"
    batches = list(load_batches(images, steps=5, batch_size=8, image_size=64))
    rows = differences(compare("overlock_atto", batches, 1e-4))
    largest = {(row["losses"], row["beside"]): row["largest difference"] for row in rows}
    assert largest["float32, kernels", "float32, plain"] < 1e-4
    assert largest["bfloat16, kernels", "bfloat16, plain"] < 1e-2
