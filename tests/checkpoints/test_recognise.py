"""Files as models: what a file without a record tells, what is taken for granted, and what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import timm
import torch
from helpers import images, randomise
from PIL import Image
from places import MODELS, SMALL, classifier, parts_of, write
from safetensors.torch import save_file

import overlock
from overlock import segmentation
from overlock.checkpoints import HEADS, Record, default_preprocessing, load_model, save_model, start_from
from overlock.checkpoints.recognise import find_variant, read_shape, recognise
from overlock.network import VARIANTS


@pytest.fixture(scope="module")
def given():
    return {name: randomise(make(), seed=1) for name, make in MODELS.items()}


@pytest.mark.parametrize("name", ["classifier", "detector", "cascade", "segmenter"])
def test_a_plain_file_as_a_model(name, given, tmp_path):
    """Told by names and shapes: head, width, classes, variant."""
    network, record = load_model(write(given[name], tmp_path / "x.pth", prefix="module."))
    heads = dict(classifier=None, detector="faster_rcnn", cascade="cascade_mask_rcnn", segmenter="upernet")
    assert (record.model, record.head, record.classes) == ("overlock_atto", heads[name], ("0", "1", "2"))
    assert record.model_args.get("hidden_channels") == (None if name == "classifier" else 32)
    expected = given[name].state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", ["features", "pyramid", "other"])
def test_a_backbone_alone_is_no_model_to_predict_with(name, given, tmp_path):
    with pytest.raises(ValueError, match=r"x\.pth: this is the backbone of an overlock_atto without a head; start a"):
        load_model(write(given[name], tmp_path / "x.pth"))


def test_dense_models_on_other_backbones(tmp_path):
    model = randomise(segmentation.upernet("test_convnext", num_classes=3, hidden_channels=32))
    write(model, tmp_path / "x.pth")
    network, record = load_model(tmp_path / "x.pth", model="test_convnext")
    assert (record.head, record.model) == ("upernet", "test_convnext")
    expected = model.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in network.state_dict().items())
    with pytest.raises(ValueError, match=r"not the weights of a upernet on OverLoCK; name another backbone .* --model"):
        load_model(tmp_path / "x.pth")


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_told_by_its_shapes(name):
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0).state_dict()
    assert find_variant(state, "x") == name
    shape = read_shape(state)
    assert replace(VARIANTS[name], **shape) == VARIANTS[name]
    assert len(shape) == 7


@pytest.mark.parametrize("name", ["detector", "segmenter"])
@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(name, channels, given, tmp_path):
    """Built, saved with a record or without, loaded, and started from weights for colours as timm converts them."""
    model = randomise(MODELS[name](in_chans=channels))
    heads = dict(detector="faster_rcnn", segmenter="upernet")
    record = Record(
        model="overlock_atto", head=heads[name], classes=("a", "b", "c"),
        model_args=dict(in_chans=channels, hidden_channels=32),
    )  # fmt: skip
    save_model(tmp_path / "x.safetensors", model.state_dict(), record)
    for path in (tmp_path / "x.safetensors", write(model, tmp_path / "x.pth")):
        network, found = load_model(path)
        assert found.model_args == record.model_args
        x = images(1, channels, 64, 64).sigmoid()
        if name == "segmenter":
            assert torch.equal(network(x), model(x))
        else:
            assert network([x[0]])[0].keys() == {"boxes", "labels", "scores"}
    start_from(model, write(given["classifier"], tmp_path / "c.pth"))
    first, colours = (
        parts_of(m).network["base_net.stages.0.embed.0.conv.weight"] for m in (model, given["classifier"])
    )
    expected = colours.sum(1, keepdim=True) if channels == 1 else colours[:, [0, 1, 2, 0]] * 3 / 4
    torch.testing.assert_close(first, expected)


def test_what_is_taken_for_granted_is_told(given, tmp_path, caplog):
    caplog.set_level(logging.INFO, "overlock")
    state = given["classifier"].state_dict()
    torch.save(dict(state_dict=state, state_dict_ema=state), tmp_path / "x.pth")
    load_model(tmp_path / "x.pth")
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "no record; its weights say overlock_atto of 3 classes, numbered; strides and the size of images are the usual",
        "the averaged weights are taken",
    ]
    with torch.device("meta"):
        named = timm.create_model("overlock_atto").state_dict()
    recognise(named, tmp_path / "y.pth")
    assert "overlock_atto of 1000 classes, from tench on; strides" in caplog.records[-1].message


def test_averages_of_torch_and_mmengine(given, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(given["classifier"])
    state = average.state_dict()
    steps = {"steps" if name == "n_averaged" else name: tensor for name, tensor in state.items()}
    for content in (state, dict(state_dict={}, ema_state_dict=steps)):
        torch.save(content, tmp_path / "x.pth")
        network, _ = load_model(tmp_path / "x.pth")
        assert torch.equal(network.head.fc.weight, given["classifier"].head.fc.weight)


def test_what_a_run_goes_on_from(given, tmp_path):
    torch.save(dict(network=given["classifier"].state_dict(), optimizer={}, average=None), tmp_path / "last.ckpt")
    for load in (load_model, lambda path: overlock.load_weights(classifier(), path)):
        with pytest.raises(ValueError, match=r"last\.ckpt: this is what a run goes on from \(--resume\); .*best\.safe"):
            load(tmp_path / "last.ckpt")


def test_a_record_of_a_later_version(given, tmp_path):
    record = Record(model="overlock_atto", classes=("a", "b", "c"), model_args=dict(num_classes=3))
    for change, said in ((dict(colour="red"), "colour"), (dict(head="mask2former"), "mask2former")):
        text = json.dumps(json.loads(record.to_json()) | change)
        save_file(given["classifier"].state_dict(), tmp_path / "x.safetensors", metadata=dict(overlock=text))
        with pytest.raises(
            ValueError, match=rf"its record has {said}, which a newer overlock wrote; update the package"
        ):
            load_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("name", "channels"), [("classifier", 4), ("detector", 4), ("segmenter", 1)])
def test_files_of_images_do_not_have_such_channels(name, channels, tmp_path):
    from overlock.deploy import Detector, Predictor, Segmenter

    kinds = dict(classifier=Predictor, detector=Detector, segmenter=Segmenter)
    path = write(MODELS[name](in_chans=channels), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"for images of {channels} channels, which files of images do not have"):
        kinds[name].from_checkpoint(path)


def test_the_crop_of_timm_s_models_is_kept():
    """Some models' images are squashed, not cropped."""
    from overlock.data import make_eval_transform

    squashed = default_preprocessing("convnext_tiny.in12k_ft_in1k_384", in_chans=3)
    assert squashed["crop_mode"] == "squash"
    assert "crop_mode" not in default_preprocessing("overlock_atto", in_chans=3)
    image = Image.new("RGB", (400, 100))
    image.paste((255, 255, 255), (350, 0, 400, 100))  # out of the centre
    assert make_eval_transform(squashed)(image).max() > 0.9
    assert make_eval_transform(dict(squashed, crop_mode="center"))(image).max() < 0


def test_a_mean_for_other_channels():
    with pytest.raises(
        ValueError, match=r"mean must have 1 or 4 values, as the images have channels, got \[0\.5, 0\.4\]"
    ):
        default_preprocessing("overlock_atto", in_chans=4, arguments=dict(mean=[0.5, 0.4]))
    four = default_preprocessing("overlock_atto", in_chans=4, arguments=dict(mean=[0.1, 0.2, 0.3, 0.4], std=[0.5]))
    assert (four["mean"], four["std"]) == ((0.1, 0.2, 0.3, 0.4), (0.5,) * 4)


@pytest.mark.parametrize("model", ["test_convnext", "test_resnet"])
@pytest.mark.parametrize("head", ["faster_rcnn", "upernet"])
def test_a_classifier_of_timm_s_starts_from_a_dense_model(model, head, tmp_path):
    """Its head is new; a backbone of another kind is refused."""
    given = randomise(HEADS[head](model, **SMALL))
    network = timm.create_model(model, num_classes=3)
    before = network.get_classifier().weight.clone()
    start_from(network, write(given, tmp_path / "x.pth"))
    body = given.get_submodule("backbone.body" if head == "faster_rcnn" else "backbone").state_dict()
    taken = {name.replace(".", "_"): tensor for name, tensor in network.state_dict().items()}
    assert all(torch.equal(tensor, taken[name.replace(".", "_")]) for name, tensor in body.items())
    assert torch.equal(network.get_classifier().weight, before)
    other = {"test_convnext": "test_resnet", "test_resnet": "test_convnext"}[model]
    with pytest.raises(ValueError, match=r"of its weights have no place in the network.*; set --model to its own"):
        start_from(timm.create_model(other, num_classes=3), tmp_path / "x.pth")


def test_former_names():
    from overlock import checkpoint, checkpoints, hub

    assert all(getattr(checkpoint, name) is getattr(checkpoints, name) for name in checkpoints.__all__)
    assert all(getattr(hub, name) is getattr(checkpoints, name) for name in hub.__all__)
