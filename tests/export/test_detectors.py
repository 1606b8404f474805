"""Exported detectors find what the networks find."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import FEWEST, images, randomise
from torchvision.io import decode_image

from overlock.checkpoints import Record
from overlock.checkpoints.record import save_model
from overlock.cli import main
from overlock.export import ExportedNetwork, Spec, export_network
from overlock.export.detectors import PlainHeads, PlainProposals, detect, suppress
from overlock.export.find import find_in_file, with_preparation
from overlock.export.parity import PHOTO, in_order_of
from overlock.tasks.detection import find_objects

CLASSES = ("cat", "dog", "bird")


def make_detector(head, **options):
    """A detector that finds many objects of random boxes."""
    arguments = dict(min_size=224, max_size=384, proposals=40, hidden_channels=8, **FEWEST, **options)
    record = Record(model="overlock_atto", head=head, classes=CLASSES, model_args=arguments)
    torch.manual_seed(0)
    network = record.make_network().eval()
    randomise(network.backbone)
    return network, record


@pytest.mark.parametrize("head", ["faster_rcnn", "cascade_mask_rcnn"])
def test_plain_heads_find_what_torchvision_s_find(head):
    """At a size that is padded, and on a map where no level has as many anchors as it may keep."""
    network, _ = make_detector(head)
    image = images(1, 3, 100, 141)
    with torch.no_grad():
        expected = detect(network, image)
        network.rpn, network.roi_heads = PlainProposals(network.rpn), PlainHeads(network.roi_heads)
        found = in_order_of(expected, detect(network.eval(), image))
    assert len(expected[0]) > 20
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_no_objects():
    network, _ = make_detector("mask_rcnn")
    network.rpn, network.roi_heads = PlainProposals(network.rpn), PlainHeads(network.roi_heads)
    network.roi_heads.stages[0].score_thresh = 1.0
    with torch.no_grad():
        shapes = [tuple(part.shape) for part in detect(network.eval(), images(1, 3, 64, 96))]
    assert shapes == [(0, 4), (0,), (0,), (0, 1, 28, 28)]
    assert suppress(torch.zeros(0, 4), torch.zeros(0), 0.5).shape == (0,)


@pytest.mark.parametrize("head", ["faster_rcnn", "cascade_mask_rcnn"])
def test_limits_are_the_network_s_own(head):
    network, record = make_detector(head)
    limits = dict(score_thresh=0.2, nms_thresh=0.4, detections_per_img=7)
    vars(getattr(network.roi_heads, "stages", [network.roi_heads])[-1]).update(limits)
    record = with_preparation(network, record)
    assert limits.items() <= record.preprocessing.items()
    spec = Spec(record=record, format="onnx", task="detect", image_size=(224, 224))
    file = SimpleNamespace(path="detector.onnx", spec=Spec.from_json(spec.to_json()))
    assert find_in_file(file, [], threshold=0.2, max_detections=7) == []
    with pytest.raises(ValueError, match=r"threshold cannot be so .* keeps up to 7 objects, of scores above 0\.2;"):
        find_in_file(file, [], threshold=0.1)
    with pytest.raises(ValueError, match="max_detections cannot be so"):
        find_in_file(file, [], max_detections=8)
    del file.spec.record.preprocessing["score_thresh"]
    with pytest.raises(ValueError, match=r"detector\.onnx: written before .* export it anew"):
        find_in_file(file, [])


def test_objects_are_matched_by_class_and_place():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
    wanted = boxes, torch.tensor([1, 1, 2]), torch.tensor([0.5, 0.5, 0.5])
    order = torch.tensor([2, 0, 1])
    for ours, theirs in zip(in_order_of(wanted, [part[order] for part in wanted]), wanted, strict=True):
        assert ours.equal(theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "form"),
    [("faster_rcnn", "onnx"), ("mask_rcnn", "openvino"), ("cascade_mask_rcnn", "torch-export")],
)
def test_files_of_free_size(head, form, tmp_path):
    """At three sizes, in an image, and the same by the command."""
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}.get(form, "torch"))
    pytest.importorskip("onnxscript")
    network, record = make_detector(head)
    spec = Spec(record=record, format=form, task="detect", image_size=(224, 224), dynamic=("size",))
    path = tmp_path / f"detector{spec.file_ending}"
    report = export_network(network, spec, path, timed=False)
    assert len({one.shape for one in report.agreements}) == 3
    assert report.largest_difference < 1e-4
    exported = ExportedNetwork(path)
    assert exported.spec.record.classes == CLASSES
    photo = decode_image(str(PHOTO)) / 255
    (expected,), (found,) = find_objects(network, [photo]), find_in_file(exported, [photo])
    assert len(expected["boxes"]) > 20
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-4, atol=1e-5)
    assert find_in_file(exported, [photo], threshold=0.3, max_detections=2)[0]["boxes"].shape[0] <= 2
    with pytest.raises(ValueError, match="nms_iou cannot be so with an exported file"):
        find_in_file(exported, [photo], nms_iou=0.3)


@pytest.mark.slow
def test_commands(tmp_path, capsys, monkeypatch):
    """Export and predict, beside the checkpoint."""
    monkeypatch.setenv("OVERLOCK_BACKEND", "torch")
    network, record = make_detector("faster_rcnn")
    checkpoint, file = tmp_path / "detector.safetensors", tmp_path / "detector.pt2"
    save_model(checkpoint, network.state_dict(), record)
    size = ("--image_size", "224", "224", "--dynamic", "size")
    assert main(["export", str(checkpoint), "--format", "torch-export", "--output", str(file), *size]) == 0
    capsys.readouterr()
    shown = []
    for source in (checkpoint, file):
        assert main(["predict", str(PHOTO), "--checkpoint", str(source), "--threshold", "0.2", "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out)[0])
    assert shown[0].keys() == shown[1].keys()
    assert len(shown[0]["objects"]) == len(shown[1]["objects"]) > 0


def test_a_file_of_features_finds_no_objects():
    class Features:
        path = "features.onnx"
        spec = dataclasses.make_dataclass("Spec", [("task", str)])("features")

    with pytest.raises(ValueError, match="objects need one of --task detect"):
        find_in_file(Features(), [])
