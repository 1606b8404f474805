"""Forward and backward at every size, batch, channel count and precision, and sentences for what cannot be."""

from __future__ import annotations

import contextlib

import pytest
import timm
import torch
from helpers import images
from torch.nn import functional as F

import overlock

SIZES = [(32, 32), (33, 47), (160, 160), (224, 224), (256, 320), (97, 640)]
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train_step(model, x, autocast):
    """One forward and backward pass in training; returns the logits."""
    context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with context:
        logits, aux = model(x)
        target = torch.arange(len(x), device=x.device) % logits.shape[1]
        loss = F.cross_entropy(logits, target) + 0.4 * F.cross_entropy(aux, target)
    loss.backward()
    return logits


def assert_trains(model, x, autocast=None):
    logits = train_step(model, x, autocast)
    assert logits.shape == (len(x), model.num_classes)
    assert logits.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def convolves_in(precision, size, batch):
    """Whether PyTorch's own convolution, of the stem's shape, has finite gradients; in 2.6 with oneDNN not for all."""
    conv = torch.nn.Conv2d(12, 12, kernel_size=3, padding=1, bias=False)
    with torch.autocast("cpu", precision):
        y = conv(torch.randn(batch, 12, -(-size[0] // 2), -(-size[1] // 2)))
    y.float().square().mean().backward()
    return bool(conv.weight.grad.isfinite().all())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_forward_and_backward(precision, size):
    """Finite logits, and a finite gradient for every parameter, for every size; one batch and channel count each."""
    step = SIZES.index(size)
    in_chans, batch = (1, 3, 4)[step % 3], (1, 3)[step % 2]
    if precision and not convolves_in(precision, size, batch):
        pytest.skip(f"PyTorch {torch.__version__} itself gives NaN for a convolution's gradient here")
    model = timm.create_model("overlock_atto", aux_head=True, num_classes=5, in_chans=in_chans).train()
    assert_trains(model, images(batch, in_chans, *size), precision)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_batches_and_channels(precision, batch, in_chans):
    """All batches, channel counts and precisions at the smallest odd size."""
    model = timm.create_model("overlock_atto", aux_head=True, num_classes=5, in_chans=in_chans).train()
    assert_trains(model, images(batch, in_chans, 33, 47), precision)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_the_smallest_published_size(precision, size):
    """OverLoCK-XT likewise."""
    model = timm.create_model("overlock_xt", aux_head=True).train()
    assert_trains(model, images(3, 3, *size), precision)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "size", [size if size in ((33, 47), (224, 224)) else pytest.param(size, marks=pytest.mark.slow) for size in SIZES]
)
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_forward_and_backward_on_cuda(precision, size):
    """The same on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = timm.create_model("overlock_atto", aux_head=True, num_classes=5).cuda().train()
    x = images(3, 3, *size).cuda()
    with torch.autocast("cuda", precision) if precision else contextlib.nullcontext():
        logits, aux = model(x)
    (logits.float().square().mean() + aux.float().square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("stem_stride", [4, 2, 1])
def test_smallest_images(stem_stride):
    """Down to 8 positions after the stem, at which the last maps are 1 x 1, a single image trains."""
    model = timm.create_model("overlock_atto", aux_head=True, num_classes=5, stem_stride=stem_stride).train()
    side = 8 * stem_stride
    assert_trains(model, images(1, 3, side, side))
    with pytest.raises(ValueError, match=f"at least {side} x {side} pixels, got {side - 1} x {side}"):
        model(images(1, 3, side - 1, side))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_models_of_other_types(dtype):
    """A model moved to another type computes in it."""
    model = timm.create_model("overlock_atto", num_classes=5).to(dtype).eval()
    logits = model(images(1, 3, 64, 64).to(dtype))
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_channels_last_gives_the_same():
    """The memory layout of the images and weights changes no value."""
    model = timm.create_model("overlock_atto", num_classes=5).eval()
    x = images(2, 3, 96, 64)
    expected = model(x)
    actual = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


WRONG = {
    "too small": (torch.zeros(1, 3, 31, 64), r"at least 32 x 32 pixels, got 31 x 64"),
    "empty sides": (torch.zeros(1, 3, 0, 0), r"at least 32 x 32"),
    "empty batch": (torch.zeros(0, 3, 64, 64), r"batch .* is empty"),
    "channels": (torch.zeros(1, 4, 64, 64), r"must have 3 channels, got 4"),
    "integers": (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), r"floating-point"),
    "one image": (torch.zeros(3, 64, 64), r"batch \(B, 3, H, W\), got 3 dimensions"),
    "video": (torch.zeros(1, 3, 8, 64, 64), r"got 5 dimensions"),
}


@pytest.mark.parametrize(("x", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("entry", ["forward", "forward_features", "forward_intermediates", "features_only", "pyramid"])
def test_wrong_images_get_one_sentence(entry, x, message):
    """Whichever way they come in."""
    model = timm.create_model("overlock_atto", features_only=entry == "features_only").eval()
    call = overlock.Pyramid(model) if entry == "pyramid" else getattr(model, entry, model)
    with pytest.raises(ValueError, match=message) as caught:
        call(x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [{"stem_stride": 3}, {"stem_stride": 8}, {"global_pool": "catavgmax"}])
def test_wrong_arguments_are_refused(arguments):
    """A stem or pooling that does not exist."""
    with pytest.raises(ValueError, match=r"stem_stride|global_pool"):
        timm.create_model("overlock_atto", **arguments)
