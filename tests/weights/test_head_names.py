"""The authors' detectors and segmenters: every name, the order of the classes, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from helpers import images, randomise

from overlock import detection, segmentation
from overlock.tasks.pyramid import Pyramid
from overlock.weights import to_official

CLASSES = 3
MODELS = {
    "mask_rcnn": lambda **k: detection.mask_rcnn("overlock_atto", num_classes=CLASSES, **k),
    "faster_rcnn": lambda **k: detection.faster_rcnn("overlock_atto", num_classes=CLASSES, **k),
    "cascade_mask_rcnn": lambda **k: detection.cascade_mask_rcnn("overlock_atto", num_classes=CLASSES, **k),
    "upernet": lambda **k: segmentation.upernet("overlock_atto", num_classes=CLASSES, hidden_channels=8, **k),
}


def pairs(module, theirs):
    return {f"{theirs}.{leaf}": tensor.clone() for leaf, tensor in module.state_dict().items()}


def conv_norm(module, theirs):
    """A convolution and its norm under the names of their ConvModule."""
    conv, norm = list(module.children())[:2]
    return {**pairs(conv, f"{theirs}.conv"), **pairs(norm, f"{theirs}.bn")}


def heads_of(stage, place):
    """A stage's heads, as they are saved: the background last, no boxes and masks of it."""
    layers = list(stage.box_head.children())
    found = {}
    if len(layers) == 2:
        for i, layer in enumerate(layers):
            found |= pairs(layer, f"roi_head.bbox_head{place}.shared_fcs.{i}")
    else:
        for i, layer in enumerate(layers[:4]):
            found |= conv_norm(layer, f"roi_head.bbox_head{place}.shared_convs.{i}")
        found |= pairs(layers[5], f"roi_head.bbox_head{place}.shared_fcs.0")
    for leaf, x in stage.box_predictor.cls_score.state_dict().items():
        found[f"roi_head.bbox_head{place}.fc_cls.{leaf}"] = torch.cat([x[1:], x[:1]])
    for leaf, x in stage.box_predictor.bbox_pred.state_dict().items():
        found[f"roi_head.bbox_head{place}.fc_reg.{leaf}"] = x[4:].clone()
    if stage.has_mask():
        for i, layer in enumerate(stage.mask_head):
            found |= pairs(layer[0], f"roi_head.mask_head{place}.convs.{i}.conv")
        found |= pairs(stage.mask_predictor.conv5_mask, f"roi_head.mask_head{place}.upsample")
        for leaf, x in stage.mask_predictor.mask_fcn_logits.state_dict().items():
            found[f"roi_head.mask_head{place}.conv_logits.{leaf}"] = x[1:].clone()
    return found


def official_detector(model):
    state = {}
    for i in range(4):
        state |= pairs(model.backbone.fpn.inner_blocks[i][0], f"neck.lateral_convs.{i}.conv")
        state |= pairs(model.backbone.fpn.layer_blocks[i][0], f"neck.fpn_convs.{i}.conv")
    rpn = model.rpn.head
    for module, theirs in ((rpn.conv[0][0], "rpn_conv"), (rpn.cls_logits, "rpn_cls"), (rpn.bbox_pred, "rpn_reg")):
        state |= pairs(module, f"rpn_head.{theirs}")
    stages = getattr(model.roi_heads, "stages", None)
    if stages is None:
        return state | heads_of(model.roi_heads, "")
    for i, stage in enumerate(stages):
        state |= heads_of(stage, f".{i}")
    return state


def official_segmenter(model):
    decode, auxiliary = model.decode_head, model.auxiliary_head
    state = pairs(decode.classifier[1], "decode_head.conv_seg")
    state |= pairs(auxiliary.classifier[1], "auxiliary_head.conv_seg")
    state |= conv_norm(auxiliary.convs[0], "auxiliary_head.convs.0")
    for name in ("bottleneck", "fpn_bottleneck"):
        state |= conv_norm(getattr(decode, name), f"decode_head.{name}")
    for i in range(4):
        state |= conv_norm(decode.psp_modules.blocks[i].layers[1], f"decode_head.psp_modules.{i}.1")
    for i in range(3):
        state |= conv_norm(decode.lateral_convs[i], f"decode_head.lateral_convs.{i}")
        state |= conv_norm(decode.fpn_convs[i], f"decode_head.fpn_convs.{i}")
    return state


def official(model):
    pyramid = next(module for module in model.modules() if isinstance(module, Pyramid))
    heads = official_segmenter(model) if hasattr(model, "decode_head") else official_detector(model)
    backbone = {f"backbone.{name}": t.clone() for name, t in to_official(pyramid.state_dict(), "pyramid").items()}
    return {"state_dict": {**backbone, **heads}, "meta": {}}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path):
    """Every tensor arrives; of the background's boxes and masks, which are never read, there is nothing."""
    model, other = randomise(MODELS[name]()), randomise(MODELS[name](), seed=1)
    torch.save(official(model), tmp_path / "theirs.pth")
    load = segmentation.load_weights if name == "upernet" else detection.load_weights
    load(other, tmp_path / "theirs.pth")
    expected = model.state_dict()
    for key, tensor in other.state_dict().items():
        skipped = 4 if "bbox_pred" in key and "rpn" not in key else 1 if "mask_fcn_logits" in key else 0
        assert torch.equal(
            tensor[skipped:] if skipped else tensor, expected[key][skipped:] if skipped else expected[key]
        )
        if skipped:
            assert not tensor[:skipped].any()


def test_classes_keep_their_meaning():
    """The score of their first class is that of our label 1."""
    model = randomise(MODELS["mask_rcnn"]())
    theirs = official(model)["state_dict"]
    x = images(2, 1024, 1, 1).flatten(1)
    logits = x @ theirs["roi_head.bbox_head.fc_cls.weight"].T + theirs["roi_head.bbox_head.fc_cls.bias"]
    ours, _ = model.roi_heads.box_predictor(x)
    torch.testing.assert_close(ours[:, 1:], logits[:, :-1])
    torch.testing.assert_close(ours[:, 0], logits[:, -1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("neck.fpn_convs.2.conv.bias"), r"1 missing \(first: backbone.fpn.layer_blocks.2.0.bias\)"),
        (lambda s: s.update(extra=torch.ones(1)), r"1 left over \(first: extra\)"),
        (
            lambda s: s.update({"roi_head.bbox_head.fc_cls.bias": torch.ones(81)}),
            r"cls_score.bias \(81,\) where the model has \(4,\)",
        ),
    ],
)
def test_what_does_not_fit(spoil, message, tmp_path):
    """Said, and the model is as it was."""
    model = randomise(MODELS["mask_rcnn"]())
    checkpoint = official(model)
    spoil(checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / "theirs.pth")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        detection.load_weights(model, tmp_path / "theirs.pth")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_other_backbones(tmp_path):
    torch.save(official(MODELS["upernet"]()), tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match="weights of OverLoCK; this model has another network"):
        segmentation.load_weights(segmentation.upernet("convnext_atto", num_classes=3), tmp_path / "theirs.pth")
