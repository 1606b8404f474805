"""The released code's outputs, stored in tests/official, and its parameter counts.

The outputs hold whatever backend mixes. Triton's runs in its interpreter, as in ops/test_backends.py.
"""

from __future__ import annotations

import os

import numpy as np
import official_weights
import oracle
import pytest
import timm
import torch
from helpers import as_double, meta, relative_error, run_interpreted

import overlock
from overlock.ops import backend
from overlock.weights import translate

UNFUSED, FUSED = 2e-5, 1e-4
RAW = 4e-5  # before the norms few channels are large: the released float32 itself is 2e-5 from float64 there
STEPS = (4, 2, 1, 1)  # of the stored dense features
OTHER_SIZES = {(160, 160): 2, (192, 256): 3, (250, 187): 4}  # size and seed
SMALLEST_BLOCK = {(1, 64, 5, 9): 6}
BLOCK_SHAPES = {(1, 64, 14, 14): 5, **SMALLEST_BLOCK, (2, 64, 9, 6): 7}
COUNTS = {  # training form with auxiliary head; merged without
    "overlock_xt": (17_307_272, 16_453_712),
    "overlock_t": (34_990_472, 33_467_040),
    "overlock_s": (58_309_772, 56_156_452),
    "overlock_b": (98_012_968, 94_942_528),
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
backends = pytest.mark.parametrize("name", ("triton",) if INTERPRETED else ("cpu", "torch", "reference"))


@pytest.fixture(scope="module")
def golden():
    return official_weights.load_golden()


@pytest.fixture(scope="module")
def image():
    return lambda seed, shape: torch.from_numpy(official_weights.draw_image(seed, shape))


@pytest.fixture(scope="module")
def photo(image):
    return image(1, (2, 3, 224, 224))


@pytest.fixture(scope="module")
def models(official_state):
    """The classification network, plain and fused, each with its pass mark."""
    model = timm.create_model("overlock_xt", aux_head=True)
    model.load_state_dict(translate(official_state("overlock_xt", "cls"), model))
    return [(model.eval(), UNFUSED), (overlock.fuse(model), FUSED)]


def assert_golden(actual, expected, mark):
    assert relative_error(actual, torch.from_numpy(expected)) < mark


def test_generator_draws_the_stored_stream():
    """The golden values apply only to this random stream: a changed one is not a wrong network."""
    weight = official_weights.draw_tensor("head.0.weight", (4, 3, 1, 1)).astype(np.float32).ravel()
    pixel = official_weights.draw_image(0, (1, 3, 64, 64))[0, 1, 33, 7]
    np.testing.assert_allclose([weight[0], weight[-1], pixel], [0.089262, 0.97952, -0.06744], atol=1e-6)


@torch.no_grad()
def test_logits(models, golden, photo):
    """Logits of the classification network."""
    for model, mark in models:
        assert_golden(model(photo), golden["logits"], mark)


@torch.no_grad()
def test_aux_logits(models, golden, photo):
    """Logits of the auxiliary head, in evaluation."""
    for model, mark in models:
        overview, _ = model.overview_net(model.base_net(photo)[-1])
        assert_golden(model.aux_head(overview), golden["aux"], mark)


@backends
@pytest.mark.parametrize("size", OTHER_SIZES, ids=str)
@torch.no_grad()
def test_logits_of_other_sizes(size, name, models, golden, image):
    """Maps smaller than the dynamic kernel, and odd ones."""
    x = image(OTHER_SIZES[size], (1, 3, *size))
    for model, mark in models:
        with backend(name):
            assert_golden(model(x), golden[f"logits_{size[0]}x{size[1]}"], mark)


@torch.no_grad()
def test_logits_of_the_deploy_file(golden, photo, official_state):
    """The authors' merged files, before and after fuse."""
    model = timm.create_model("overlock_xt", deploy=True).eval()
    model.load_state_dict(translate(official_state("overlock_xt", "cls_deploy"), model))
    assert_golden(model(photo), golden["logits_deploy"], UNFUSED)
    assert_golden(overlock.fuse(model)(photo), golden["logits_deploy"], FUSED)


@pytest.mark.parametrize("form", ["dense_seg", "dense_det"])
@torch.no_grad()
def test_dense_features(form, golden, photo, official_state):
    """The dense backbones' outputs, before and after fuse, and what goes into their norms."""
    model = overlock.Pyramid(timm.create_model("overlock_xt"), overview=form == "dense_det").eval()
    model.load_state_dict(translate(official_state("overlock_xt", form), model))
    raw: list[torch.Tensor] = [torch.empty(0)] * 4
    for i, norm in enumerate(model.norms):
        norm.register_forward_pre_hook(lambda module, args, i=i: raw.__setitem__(i, args[0]))
    plain = model(photo)
    unnormed = list(raw)
    fused = overlock.fuse(model)(photo)
    for i, step in enumerate(STEPS):
        key = "feat3_det" if (i, form) == (3, "dense_det") else f"feat{i}"
        assert_golden(plain[i][:, :, ::step, ::step], golden[key], UNFUSED)
        assert_golden(fused[i][:, :, ::step, ::step], golden[key], FUSED)
        assert_golden(unnormed[i][:1, :, ::step, ::step], golden[f"raw{i}"], RAW)


@backends
@pytest.mark.parametrize("form", ["block", "block_ls"])
@torch.no_grad()
def test_stand_alone_block(form, name, golden, official_state, image):
    """The plug-in block without and with scaled residuals, before and after fuse."""
    block = overlock.ContMixBlock(64, groups=4, kernel_size=7, scaled=form == "block_ls").eval()
    block.load_state_dict(translate(official_state("contmix_block", form), block))
    shapes = SMALLEST_BLOCK if INTERPRETED else BLOCK_SHAPES
    for shape, seed in shapes.items():
        expected = golden[f"{form}_{shape[2]}x{shape[3]}"]
        with backend(name):
            assert_golden(block(image(seed, shape)), expected, UNFUSED)
            assert_golden(overlock.fuse(block)(image(seed, shape)), expected, FUSED)


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
@pytest.mark.parametrize(
    "test",
    [
        *(
            pytest.param(f"test_stand_alone_block[{block}-triton]", marks=pytest.mark.slow)
            for block in ("block", "block_ls")
        ),
        *(pytest.param(f"test_logits_of_other_sizes[{size}-triton]", marks=pytest.mark.slow) for size in OTHER_SIZES),
    ],
)
def test_triton_in_the_interpreter(test):
    """The plug-in block and the whole network, with Triton's kernels."""
    pytest.importorskip("triton", minversion="3.3")
    run_interpreted(f"{__file__}::{test}")


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    """Parameters to the last one, in training with auxiliary head and merged without."""

    def count(**kwargs):
        return sum(p.numel() for p in meta(name, **kwargs).parameters())

    assert (count(aux_head=True), count(deploy=True)) == COUNTS[name]


@torch.no_grad()
def test_oracle_logits(golden, official_state, image):
    """The slow implementation that the other tests trust gives the released outputs too."""
    state = as_double(official_state("overlock_xt", "cls"))
    maps, _ = oracle.features(state, image(2, (1, 3, 160, 160)).double())
    assert_golden(oracle.logits(state, maps[3]), golden["logits_160x160"], UNFUSED)


@torch.no_grad()
def test_oracle_dense_features(golden, official_state, photo):
    """The slow implementation of the detection backbone, on which the overview and all norms lie."""
    state = as_double(official_state("overlock_xt", "dense_det"))
    outputs = oracle.dense(state, *oracle.features(state, photo.double()))
    for output, key, step in zip(outputs, ("feat0", "feat1", "feat2", "feat3_det"), STEPS, strict=True):
        assert_golden(output[:, :, ::step, ::step], golden[key], UNFUSED)


@pytest.mark.parametrize("form", ["block", "block_ls"])
@torch.no_grad()
def test_oracle_block(form, golden, official_state, image):
    """The slow implementation of the plug-in block."""
    state = as_double(official_state("contmix_block", form))
    for shape, seed in BLOCK_SHAPES.items():
        output = oracle.contmix_block(state, image(seed, shape).double())
        assert_golden(output, golden[f"{form}_{shape[2]}x{shape[3]}"], UNFUSED)
