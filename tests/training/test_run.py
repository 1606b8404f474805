"""A run learns, writes what prediction needs, and does what its recipe says."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from pictures import COLOURS, make_classes, make_image
from PIL import Image
from runs import run, settings
from torch.nn import functional as F

from overlock.checkpoints import load_classifier
from overlock.data import load_data
from overlock.data.loaders import Batch
from overlock.deploy import Predictor
from overlock.training import TrainConfig
from overlock.training.classification import Classification, make_network
from overlock.training.config import LossConfig, OptimConfig
from overlock.training.optim import make_optimizer, make_schedule
from overlock.training.run import train

PLAIN = dict(
    augment=dict(rand_augment=None, erasing=0.0, scale=(0.6, 1.0)),
    loss=dict(mixup=0.0, cutmix=0.0),
    drop_path=0.0,
    batch_size=8,
    optim=dict(lr=2e-3, base_batch_size=8, min_lr=2e-5),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    make_classes(folder / "data", 20)
    config = settings(folder / "data", folder / "run", model="overlock_atto", epochs=8, **PLAIN)
    return config, train(config)


def test_learns_colours(trained):
    _, result = trained
    assert result.score == 1.0
    predictor = Predictor.from_checkpoint(result.folder)
    for colour in COLOURS:
        assert predictor(make_image(colour, 12345, 50)).labels[0] == colour


def test_the_reported_accuracy_is_that_of_the_saved_weights(tmp_path):
    make_classes(tmp_path / "data" / "train", 4)
    make_classes(tmp_path / "data" / "val", 5, seed=77)
    result = train(settings(tmp_path / "data", tmp_path / "run", epochs=1))
    predictor = Predictor.from_checkpoint(tmp_path / "run", device="cpu")
    files = sorted((tmp_path / "data" / "val").rglob("*.png"))
    hits = sum(p.labels[0] == f.parent.name for f, p in zip(files, predictor(files), strict=True))
    assert result.score == pytest.approx(hits / len(files))


def test_files_of_a_run(trained):
    config, result = trained
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "README.md", "best.safetensors", "checkpoints", "config.json", "config.yaml", "curves.png",
        "environment.json", "log.csv", "model.safetensors", "tensorboard",
    ]  # fmt: skip
    assert TrainConfig.from_dict(yaml.safe_load((result.folder / "config.yaml").read_text())) == config
    network, record = load_classifier(result.folder)
    assert record.classes == tuple(COLOURS)
    assert record.preprocessing["input_size"] == (3, 32, 32)
    assert not any(name.startswith("aux_head") for name in network.state_dict())
    assert "torch" in json.loads((result.folder / "environment.json").read_text())["versions"]
    assert Image.open(result.folder / "curves.png").width > 500
    lines = (result.folder / "log.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,step,lr,loss,top1,top5,test_loss,skipped")
    assert len(lines) == 9
    assert float(lines[-1].split(",")[4]) == result.score
    card = (result.folder / "README.md").read_text()
    assert "100.00" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "timm"
    assert any((result.folder / "tensorboard").iterdir())
    Predictor.from_checkpoint(result.folder / "best.safetensors")


def test_timm_loads_a_run(trained):
    _, result = trained
    ours, _ = load_classifier(result.folder)
    theirs = timm.create_model(f"local-dir:{result.folder}", pretrained=True).eval()
    assert theirs.pretrained_cfg["label_names"] == list(COLOURS)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images))


def test_the_average_is_what_is_kept(trained):
    _, result = trained
    checkpoint = torch.load(result.folder / "checkpoints" / "last.ckpt", weights_only=True)
    kept = load_classifier(result.folder)[0].state_dict()
    assert all(torch.equal(kept[name], checkpoint["average"][name]) for name in kept)
    assert any(not torch.equal(kept[name], checkpoint["network"][name]) for name in kept)


def test_fine_tunes_from_a_run_with_other_classes(trained, tmp_path):
    """New classifier, new image size, a frozen sub-network and layer-wise rates."""
    _, result = trained
    make_classes(tmp_path / "data", 4, colours=("red", "green"))
    config = settings(
        tmp_path / "data", tmp_path / "run", model="overlock_atto", epochs=1, weights=str(result.folder), image_size=64,
        freeze=["base_net"], optim=dict(layer_decay=0.5, lr=1e-2),
    )  # fmt: skip
    train(config)
    before, after = (load_classifier(f)[0].state_dict() for f in (result.folder, tmp_path / "run"))
    assert after["head.fc.weight"].shape[0] == 2
    assert load_classifier(tmp_path / "run")[1].preprocessing["input_size"] == (3, 64, 64)
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("base_net")} <= same  # statistics of its norms too
    changed = {name.partition(".")[0] for name in set(after) - same}
    assert changed == {"overview_net", "focus_net", "head"}


def test_weights_of_the_hub(trained, tmp_path, monkeypatch):
    import huggingface_hub

    _, result = trained
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *args: asked.append(args) or str(result.folder / args[1])
    )
    make_classes(tmp_path / "data", 4)
    config = settings(
        tmp_path / "data", tmp_path / "run", model="overlock_atto", epochs=1, weights="hf-hub:me/colours",
        freeze=["base_net"],
    )  # fmt: skip
    train(config)
    assert asked == [("me/colours", "model.safetensors")]
    name = "base_net.stages.0.blocks.0.ffn.expand.weight"
    before, after = (load_classifier(f)[0].state_dict()[name] for f in (result.folder, tmp_path / "run"))
    assert torch.equal(before, after)


def test_trains_any_model_of_timm_and_grey_images(tmp_path):
    make_classes(tmp_path / "data", 4)
    result = train(
        settings(tmp_path / "data", tmp_path / "run", model="test_convnext", image_size=64, in_chans=1, epochs=1)
    )
    assert 0 <= result.score <= 1
    assert Predictor.from_checkpoint(result.folder)(make_image("red", 0)).labels[0] in COLOURS


@pytest.mark.parametrize(
    "changes",
    [
        dict(runtime=dict(channels_last=True, grad_checkpointing=True)),
        dict(runtime=dict(micro_batch=2)),
        dict(ema=dict(decay=0.0), loss=dict(aux_weight=0.0), augment=dict(repeats=2, padding=2)),
        dict(optim=dict(name="lamb", clip_norm=0.0), ema=dict(decay=0.99, warmup=True)),
    ],
)
def test_options(tmp_path, changes):
    make_classes(tmp_path / "data", 8)
    assert "epoch   1/1" in run(settings(tmp_path / "data", tmp_path / "run", epochs=1, **changes))


def test_accumulated_gradients_are_those_of_the_batch(tmp_path):
    """For a network without batch norm, so that parts of a batch do not see each other."""
    make_classes(tmp_path / "data", 8)
    losses = []
    for micro_batch in (8, 2):
        folder = tmp_path / str(micro_batch)
        config = settings(
            tmp_path / "data", folder, model="test_convnext", image_size=64,
            runtime=dict(micro_batch=micro_batch), **PLAIN,
        )  # fmt: skip
        run(config)
        lines = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
        losses.append([float(x) for line in lines[1:] for x in line[2:7]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_loss_of_both_heads():
    outputs = torch.randn(2, 8, 3).unbind()
    batch = Batch(torch.zeros(8, 3, 8, 8), torch.arange(8) % 3, ())
    task = Classification(LossConfig(label_smoothing=0.1, aux_weight=0.4), 3)
    expected = sum(
        w * F.cross_entropy(o, batch.labels, label_smoothing=0.1) for w, o in zip((1, 0.4), outputs, strict=True)
    )
    torch.testing.assert_close(task.loss(lambda _: outputs, batch), expected)
    torch.testing.assert_close(
        task.loss(lambda _: outputs[0], batch), F.cross_entropy(outputs[0], batch.labels, label_smoothing=0.1)
    )


def test_loss_of_mixed_images():
    """Labels are mixed as the images are, for the auxiliary head too."""
    import numpy as np

    outputs = torch.randn(2, 8, 3).unbind()
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 4, 4).clone()
    labels = torch.arange(8) % 3
    task = Classification(LossConfig(mixup=0.8, label_smoothing=0.1, aux_weight=0.4), 3)
    seen = []
    np.random.seed(0)
    loss = task.loss(lambda x: seen.append(x) or outputs, Batch(images.clone(), labels, ()))
    share = 1 - float(seen[0][0, 0, 0, 0]) / 7  # image 0 is mixed with image 7
    assert 0 < share < 1
    smooth = F.one_hot(labels, 3) * 0.9 + 0.1 / 3
    targets = share * smooth + (1 - share) * smooth.flip(0)
    cross = [-(targets * o.log_softmax(1)).sum(1).mean() for o in outputs]
    torch.testing.assert_close(loss, cross[0] + 0.4 * cross[1])


def test_schedule_and_parameter_groups():
    """The rate grows with the batch, warms up and falls as a cosine; norms and biases do not decay."""
    config = TrainConfig(
        data="x",
        epochs=10,
        batch_size=512,
        optim=OptimConfig(lr=2e-2, base_batch_size=1024, warmup_epochs=2, min_lr=1e-4),
    )
    network = timm.create_model("overlock_atto", num_classes=3, aux_head=True)
    optimizer = make_optimizer(network, config.optim, batch_size=512)
    schedule = make_schedule(optimizer, config, steps_per_epoch=5)
    rates = []
    for step in range(50):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    warm = [1e-6 + i * (1e-2 - 1e-6) / 10 for i in range(10)]
    fall = [1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * i / 40)) / 2 for i in range(40)]
    assert rates == pytest.approx(warm + fall)
    assert len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        (dict(schedule="multistep", milestones=(4, 6)), [1.0] * 16 + [0.1] * 8 + [0.01] * 8),
        (dict(schedule="linear", min_lr=0), [1 - i / 32 for i in range(4, 36)]),
    ],
)
def test_schedules_by_steps(optim, expected):
    """A warm-up of 4 steps, then milestones at their epochs, or linearly to zero at the last step."""
    config = TrainConfig(
        data="x",
        epochs=8,
        batch_size=8,
        optim=OptimConfig(lr=1.0, base_batch_size=8, warmup_steps=4, warmup_lr=0, **optim),
    )
    optimizer = make_optimizer(torch.nn.Linear(2, 2), config.optim, batch_size=8)
    schedule = make_schedule(optimizer, config, steps_per_epoch=4)
    rates = []
    for step in range(32):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:4] == [0, 0.25, 0.5, 0.75]
    after = expected[4:] if optim["schedule"] == "multistep" else expected[:28]
    assert rates[4:] == pytest.approx(after)


def test_layer_decay_falls_towards_the_images():
    network = timm.create_model("overlock_atto", num_classes=3)
    optimizer = make_optimizer(network, OptimConfig(lr=1.0, layer_decay=0.5), batch_size=1024)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: scale[id(p)] for name, p in network.named_parameters()}
    assert by_name["head.fc.weight"] == 1
    order = ["base_net.stages.0.embed.0.conv.weight", "base_net.stages.2.blocks.0.ffn.expand.weight",
             "overview_net.stage.blocks.0.ffn.expand.weight", "focus_net.stage3.blocks.0.ffn.expand.weight",
             "focus_net.stage4.blocks.0.ffn.expand.weight", "head.fc.weight"]  # fmt: skip
    assert [by_name[name] for name in order] == sorted(by_name[name] for name in order)
    assert len({by_name[name] for name in order}) == len(order)


def test_a_baseline_takes_its_own_arguments_and_weights(tmp_path):
    """convnext's stem of single pixels keeps images of 32 x 32 at 4 x 4 to the end; its record builds it again so.

    Another run starts from its weights, with its classifier where the classes are as many, and a new one where not.
    """
    make_classes(tmp_path / "data", 5)
    args = dict(patch_size=1, depths=[1, 1, 1, 1], dims=[8, 8, 8, 8])
    config = settings(tmp_path / "data", tmp_path / "run", epochs=1, model="convnext_atto", model_args=args)
    train(config)
    network, record = load_classifier(tmp_path / "run")
    assert record.model_args["patch_size"] == 1
    assert network.forward_features(torch.zeros(1, 3, 32, 32)).shape[2:] == (4, 4)
    for folder, alike in (("data", True), ("fewer", False)):
        if not alike:
            make_classes(tmp_path / folder, 5, colours=tuple(COLOURS)[:2])
        again = replace(config, data=str(tmp_path / folder), weights=str(tmp_path / "run"))
        started, _ = make_network(again, load_data(again.data))
        differs = [name for name, p in started.state_dict().items() if not p.equal(network.state_dict()[name])]
        assert differs == ([] if alike else ["head.fc.weight", "head.fc.bias"])
    with pytest.raises(ValueError, match="size mismatch"):
        make_network(replace(again, model_args=dict(args, dims=[8, 8, 8, 16])), load_data(again.data))


def test_output_is_not_overwritten_unasked(trained):
    config, result = trained
    before = (result.folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="not empty; choose another one, or pass --resume"):
        train(config)
    assert (result.folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model="overlock_tt"), "unknown model 'overlock_tt'; did you mean 'overlock_t'"),
        (dict(image_size=16), "image_size must be at least 32 with this stem, got 16"),
        (dict(weights="nowhere.pth"), "nowhere.pth: no such file"),
        (dict(data="nowhere"), "nowhere: no such folder"),
        (dict(model="test_convnext", weights="nowhere.pth"), "nowhere.pth: no such file"),
        (dict(freeze=["base"]), "no parameter's name begins with 'base'; OverLoCK has base_net"),
        (dict(freeze=["base_net", "overview_net", "focus_net", "head", "aux_head"]), "freeze leaves nothing to train"),
        (dict(batch_size=5), "mixup and cutmix join images by pairs"),
        (dict(optim=dict(name="adamwx")), "optim.name 'adamwx' cannot be used"),
    ],
)
def test_faults_leave_nothing_behind(tmp_path, changes, message):
    make_classes(tmp_path / "data", 2)
    changes = dict(changes)
    data = changes.pop("data", tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        train(settings(data, tmp_path / "run", **changes))
    left = [path.name for path in (tmp_path / "run").rglob("*")] if (tmp_path / "run").exists() else []
    assert left == []


def test_output_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; choose another output"):
        train(settings(tmp_path / "data", tmp_path / "file" / "run"))


def test_no_image_of_a_batch_is_readable(tmp_path):
    root = make_classes(tmp_path / "data", 4)
    for file in root.rglob("*.png"):
        file.write_bytes(b"not a picture")
    told = r"none of the \d+ images tried for a batch can be read; the first: .*not an image"
    with pytest.raises(ValueError, match=told):
        train(settings(root, tmp_path / "run"))
