"""Last features of stride 16 or 8, for heads that want large maps: the same weights, and those of stride 32 in them."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers import images, randomise, relative_error, tiny
from torch.export import Dim, export

import overlock
from overlock.network.space_to_batch import batch_to_space, space_to_batch
from overlock.tasks.detection import faster_rcnn

SIZES = [(64, 64), (96, 65), (33, 47), (161, 130), (32, 32)]
EXPORTS_ANY_SIZE = torch.__version__ >= (2, 7)  # earlier ones cannot prove that rows repeated to a multiple divide
strides = pytest.mark.parametrize("stride", [16, 8])


def make(**options):
    return randomise(tiny(**options))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("size", [(8, 12), (5, 7), (1, 2), (3, 1)])
def test_space_to_batch(dilation, size, layout):
    """Rows and columns by their start, the last repeated; and back."""
    x = images(2, 3, *size).contiguous(memory_format=layout)
    maps = space_to_batch(x, dilation).unflatten(0, (dilation, dilation, 2))
    assert maps.shape[-2:] == tuple(-(-side // dilation) for side in size)
    for row in range(min(dilation, size[0])):
        for column in range(min(dilation, size[1])):
            expected = x[:, :, row::dilation, column::dilation]
            assert torch.equal(maps[row, column][:, :, : expected.shape[2], : expected.shape[3]], expected)
    if dilation > 1 and size[0] % dilation:
        assert torch.equal(maps[-1, 0, :, :, -1], x[:, :, -1, ::dilation])
    restored = batch_to_space(space_to_batch(x, dilation), dilation, x)
    assert torch.equal(restored, x)
    if layout == torch.channels_last and dilation > 1:
        assert space_to_batch(x, dilation).is_contiguous(memory_format=layout)


@strides
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_features_of_stride_32_are_among_them(stride, size):
    """At every second or fourth position of the larger maps."""
    x = images(2, 3, *size)
    coarse, fine = (make(output_stride=s).forward_intermediates(x, intermediates_only=True) for s in (32, stride))
    for level, (wanted, found) in enumerate(zip(coarse, fine, strict=True)):
        step = max(1, 4 * 2**level // stride)
        reduction = min(4 * 2**level, stride)
        assert found.shape[2:] == tuple(-(-side // reduction) for side in size)
        torch.testing.assert_close(found[..., ::step, ::step], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [4, 24, 64, 0, "16", None])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match=r"output_stride must be one of \(8, 16, 32\)"):
        tiny(output_stride=value)


@pytest.mark.parametrize(("stem_stride", "expected"), [(4, [4, 8, 8, 8]), (2, [2, 4, 8, 8]), (1, [1, 2, 4, 8])])
@torch.no_grad()
def test_with_other_stems(stem_stride, expected):
    """What the stem leaves out needs no dilation; the strides are stated as they are."""
    features = timm.create_model("overlock_atto", features_only=True, stem_stride=stem_stride, output_stride=8).eval()
    assert features.feature_info.reduction() == expected
    for x, stride in zip(features(images(1, 3, 64, 32)), expected, strict=True):
        assert x.shape[2:] == (64 // stride, 32 // stride)


@strides
@pytest.mark.parametrize("indices", [(0, 1), (2,), (1, -1)])
@torch.no_grad()
def test_features_only(stride, indices):
    features = timm.create_model("overlock_atto", features_only=True, output_stride=stride, out_indices=indices).eval()
    whole = timm.create_model("overlock_atto", output_stride=stride).eval()
    features.model.load_state_dict(whole.state_dict(), strict=False)
    x = images(1, 3, 65, 96)
    wanted = whole.forward_intermediates(x, list(indices), intermediates_only=True)
    for actual, expected, reduction in zip(features(x), wanted, features.feature_info.reduction(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert actual.shape[3] == 96 // reduction


def test_weights_are_the_same():
    """Names and shapes, so that files load in both directions."""
    dilated, plain = tiny(output_stride=8), make()
    assert not any(dilated.load_state_dict(plain.state_dict()))
    assert [p.shape for p in dilated.parameters()] == [p.shape for p in plain.parameters()]


@strides
@torch.no_grad()
def test_fused(stride):
    """By the same kernels."""
    x = images(2, 3, 96, 65)
    for model in (make(output_stride=stride), randomise(overlock.Pyramid(tiny(output_stride=stride), overview=True))):
        expected = model(x)
        for kernels in (True, False):
            actual = overlock.fuse(model, kernels=kernels)(x)
            pairs = [(actual, expected)] if isinstance(expected, torch.Tensor) else zip(actual, expected, strict=True)
            assert all(relative_error(ours, wanted) < 1e-4 for ours, wanted in pairs)


@strides
def test_training(stride):
    """Both heads, a gradient for every parameter, and the same with checkpoints."""
    gradients = []
    for checkpoints in (False, True):
        model = randomise(tiny(output_stride=stride, aux_head=True)).train()
        model.set_grad_checkpointing(checkpoints)
        logits, aux = model(images(2, 3, 64, 96))
        assert logits.shape == aux.shape == (2, 5)
        (logits.square().mean() + aux.square().mean()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def export_for_any_size(model):
    some = {2: Dim("height", min=33, max=2048), 3: Dim("width", min=33, max=2048)}
    dynamic = {0: Dim("batch", min=1, max=64), **some}
    return export(model, (images(2, 3, 96, 64),), dynamic_shapes=(dynamic,), strict=False).module()


GRAPHS = {
    "scripted": torch.jit.script,
    "traced by fx": torch.fx.symbolic_trace,
    "compiled in one piece": lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"),
    "exported": export_for_any_size,
}
SLOW_GRAPHS = ("compiled in one piece", "exported")  # tests/test_graphs.py has those of the usual stride


@pytest.mark.parametrize("stride", [16, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "graph", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_GRAPHS)) for name in GRAPHS]
)
@torch.no_grad()
def test_graphs(graph, stride):
    """The same for images of any size."""
    if graph == "exported" and not EXPORTS_ANY_SIZE:
        pytest.skip("this PyTorch cannot export it")
    model = make(output_stride=stride)
    made = GRAPHS[graph](model)
    for size in [(96, 64), (161, 130)]:
        x = images(1, 3, *size)
        assert relative_error(made(x), model(x)) < 1e-4
    torch.compiler.reset()


@strides
def test_segmenter(stride):
    """UperNet takes larger maps as they are."""
    pytest.importorskip("transformers")
    from overlock.tasks.segmentation import upernet

    model = upernet("overlock_atto", num_classes=3, hidden_channels=16, output_stride=stride).train()
    logits, auxiliary = model(images(1, 3, 64, 96))
    assert logits.shape == auxiliary.shape == (1, 3, 64, 96)
    assert [level["reduction"] for level in model.backbone.feature_info] == [min(s, stride) for s in (4, 8, 16, 32)]


@pytest.mark.parametrize("options", [{"output_stride": 16}, {"stem_stride": 2}])
def test_detector_refuses(options):
    """Its anchors are made for strides 4 to 64."""
    with pytest.raises(ValueError, match="leave out stem_stride and output_stride"):
        faster_rcnn("overlock_atto", num_classes=2, **options)


@pytest.mark.parametrize(
    ("name", "stride"), [("DeepLabV3Plus", 16), ("DeepLabV3Plus", 8), ("DeepLabV3", 8), ("PAN", 16), ("PAN", 32)]
)
def test_segmentation_models_pytorch(name, stride):
    """The models that ask for an output stride."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, name)(
        "tu-overlock_atto", encoder_weights=None, encoder_output_stride=stride, classes=3
    ).train()  # fmt: skip
    side = 128 if stride < 32 else 256  # PAN halves the last map three times
    logits = model(images(2, 3, side, side))
    assert logits.shape == (2, 3, side, side)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
