"""Class activation maps against the library's own use of it, the layers of networks, and scores with known values."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from helpers import images, randomise

from overlock.analysis.activation_maps import METHODS, activation_map, find_layers, target_of
from overlock.analysis.backbones import make_stages
from overlock.analysis.map_scores import box_energy, insertion_deletion
from overlock.tasks.detection import faster_rcnn
from overlock.tasks.segmentation import upernet

STAGES = {"stage1", "stage2", "stage3", "stage4"}


@pytest.mark.parametrize("name", ["overlock_atto", "resnet10t", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_layers_give_the_features(name):
    """Of the hooks' outputs, made maps, those that the network's own features are."""
    network = timm.create_model(name, num_classes=3).eval()
    layers = find_layers(network, name)
    x = images(1, 3, 224, 224)
    seen = {}

    def note(layer, output):
        seen[layer.name] = layer.reshape(output)

    for layer in layers.values():
        layer.module.register_forward_hook(lambda _, __, output, layer=layer: note(layer, output))
    with torch.no_grad():
        features = make_stages(network, name)(x)
    assert set(layers) - {"overview"} == STAGES
    for stage, feature in enumerate(features, start=1):
        torch.testing.assert_close(seen[f"stage{stage}"], feature)


def test_overview_is_the_output_of_the_net():
    network = randomise(timm.create_model("overlock_atto", num_classes=3))
    layer = find_layers(network, "")["overview"]
    assert layer.module is network.overview_net.stage


@pytest.mark.parametrize("method", ["gradcam", "layercam"])
@pytest.mark.parametrize("name", ["resnet10t", "overlock_atto"])
def test_agrees_with_the_library(name, method):
    library = pytest.importorskip("pytorch_grad_cam")
    network, x = randomise(timm.create_model(name, num_classes=3)), images(1, 3, 96, 128)
    module = network.layer4 if name == "resnet10t" else network.focus_net.stage4.blocks[-1].residual2
    target, label = target_of(network, x, "classify")
    assert label == int(network(x).argmax())
    found = activation_map(network, x, find_layers(network, name)["stage4"], [target], method=method)
    with getattr(library, METHODS[method])(network, [module]) as cam:
        expected = cam(input_tensor=x, targets=None)
    np.testing.assert_array_equal(found, expected)
    assert found.shape == (1, 96, 128)
    assert found.max() == pytest.approx(1, abs=1e-3)


def test_gradcam_by_hand():
    """Mean gradient times activation, positive part, of the last stage: without the library."""
    pytest.importorskip("pytorch_grad_cam")
    network, x = randomise(timm.create_model("overlock_atto", num_classes=3)), images(1, 3, 96, 96)
    layer = find_layers(network, "")["overview"]
    kept = []
    hook = layer.module.register_forward_hook(lambda _, __, output: kept.append(output))
    logits = network(x)
    hook.remove()
    (slopes,) = torch.autograd.grad(logits[0, 2], kept[0])
    small = (slopes.mean(dim=(2, 3), keepdim=True) * kept[0]).sum(dim=1).relu()
    target, _ = target_of(network, x, "classify", 2)
    found = torch.from_numpy(activation_map(network, x, layer, [target]))
    enlarged = torch.nn.functional.interpolate(small[None], size=(96, 96), mode="bilinear")[0].detach()
    assert np.corrcoef(found.flatten(), enlarged.flatten())[0, 1] > 0.98


@pytest.mark.parametrize("backbone", ["overlock_atto", "resnet10t"])
def test_detectors_and_segmenters(backbone):
    pytest.importorskip("pytorch_grad_cam")
    pytest.importorskip("transformers")
    x = images(1, 3, 64, 64).sigmoid()
    segmenter = randomise(upernet(backbone, num_classes=3, hidden_channels=16))
    detector = randomise(faster_rcnn(backbone, num_classes=2, min_size=64, hidden_channels=16, proposals=20))
    for network, task in ((segmenter, "segment"), (detector, "detect")):
        target, label = target_of(network, x, task)
        assert 0 <= label < 3
        layers = find_layers(network, "")
        found = [activation_map(network, x, layers[name], [target])[0] for name in ("stage3", "stage4")]
        assert all(cam.shape == (64, 64) for cam in found)
        assert max(cam.max() for cam in found) > 0.9  # one may be empty, where nothing speaks for the class


def test_energy():
    cam = np.zeros((4, 6))
    cam[1:3, 2:4] = 1
    assert box_energy(cam, [(2, 1, 4, 3)]) == (1, 4 / 24)
    assert box_energy(cam, [(0, 0, 3, 4), (0, 0, 3, 4)]) == (0.5, 12 / 24)
    with pytest.raises(ValueError, match="no boxes"):
        box_energy(cam, [])


def test_insertion_and_deletion():
    """A network that looks at one corner: a map of that corner is better than its opposite in both."""
    weight = torch.zeros(1, 1, 20, 20)
    weight[..., :10, :10] = 1

    def predict(x):
        evidence = (x * weight).sum(dim=(1, 2, 3))
        return torch.stack([evidence / 10 - 5, 5 - evidence / 10], dim=1)

    image = torch.ones(1, 1, 20, 20)
    image[..., 12:, 12:] = -1
    cam = np.zeros((20, 20))
    cam[:10, :10] = 1
    good, bad = (insertion_deletion(predict, image, values, 0) for values in (cam, 1 - cam))
    assert good[0] > 0.9
    assert good[0] >= bad[0]
    assert good[1] < 0.25
    assert bad[1] > 0.75
