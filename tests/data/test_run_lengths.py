"""Masks as run lengths: the pixels that they stand for, COCO's form, and batches that carry them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from overlock.data.run_lengths import Masks, empty, encode, from_tensor, unpack


def draw(seed: int, count: int = 3, size: tuple[int, int] = (7, 11)) -> torch.Tensor:
    """Masks (N, H, W), one of them without a pixel and one with all."""
    masks = torch.rand(count, *size, generator=torch.Generator().manual_seed(seed)) < 0.4
    masks[0], masks[1] = False, True
    return masks


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9))
def test_pixels_come_back(seed, height, width):
    pixels = draw(seed, size=(height, width))
    masks = from_tensor(pixels)
    assert masks.shape == (3, height, width)
    assert np.array_equal(np.asarray(masks), pixels)
    assert masks.areas() == pixels.sum((1, 2)).tolist()
    for one, runs in zip(masks.to_coco(), masks.runs, strict=True):
        assert np.array_equal(coco.decode(one), Masks((height, width), [np.array(unpack(one["counts"]))])[0])
        assert unpack(one["counts"]) == runs.tolist()


@given(st.integers(0, 2**31), st.integers(0, 4), st.integers(0, 6))
def test_a_part_is_placed_at_its_corner(seed, top, left):
    part = draw(seed)[2].numpy()
    whole = np.zeros((11, 17), dtype=bool)
    whole[top : top + 7, left : left + 11] = part
    assert np.array_equal(Masks((11, 17), [encode(part, (top, left), (11, 17))])[0], whole)


def test_batches_carry_them_as_they_are():
    """Lightning and PyTorch's loaders walk through sequences, which would decode every mask."""
    apply = pytest.importorskip("lightning_utilities").apply_to_collection
    masks = from_tensor(draw(0))
    assert not isinstance(masks, Sequence)
    assert apply([dict(masks=masks)], torch.Tensor, lambda x: x)[0]["masks"] is masks
    assert [mask.shape for mask in masks] == [(7, 11)] * 3
    assert len(masks[1:]) == 2
    assert empty((4, 5)).shape == (0, 4, 5)
    assert np.asarray(empty((4, 5))).shape == (0, 4, 5)
