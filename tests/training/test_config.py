"""Settings that cannot be are refused at once; recipes are the paper's."""

from __future__ import annotations

import dataclasses

import pytest
import timm

from overlock.data import Augmentation
from overlock.network import VARIANTS
from overlock.training import CONFIGS, RECIPES, DetectConfig, SegmentConfig, TrainConfig
from overlock.training.config import EmaConfig, LossConfig, OptimConfig, RuntimeConfig, SafetyConfig

GROUPS = dict(
    augment=Augmentation, loss=LossConfig, optim=OptimConfig, ema=EmaConfig, runtime=RuntimeConfig, safety=SafetyConfig
)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(epochs=0), "epochs must be a finite number at least 1, got 0"),
        (dict(batch_size=-1), "batch_size must be a finite number at least 1"),
        (dict(optim=dict(lr=0.0)), r"optim\.lr must be a finite number at least 1e-12, got 0"),
        (dict(optim=dict(lr=float("nan"))), r"optim\.lr must be a finite number"),
        (dict(optim=dict(lr=1e-7)), r"optim\.min_lr 1e-05 is above the peak learning rate"),
        (dict(runtime=dict(workers=-1)), r"runtime\.workers must be a finite number at least 0"),
        (dict(loss=dict(label_smoothing=1.0)), r"loss\.label_smoothing must be a finite number in 0 to"),
        (dict(augment=dict(scale=[0.5, 0.1])), r"augment\.scale must be a range"),
        (dict(augment=dict(rand_augment="m9")), r"augment\.rand_augment must be like rand-m9"),
        (dict(augment=dict(rand_augment="rand-m9-magic")), r"augment\.rand_augment must be like rand-m9"),
        (dict(augment=dict(rand_augment="rand-m9-tnothing")), r"augment\.rand_augment must be like rand-m9"),
        (dict(augment=dict(rand_augment="rand-m99")), "magnitude 99, of which timm takes 10 at most"),
        (dict(epochs=1.5), "epochs must be a whole number, got 1.5"),
        (dict(batch_size="8"), "batch_size must be a whole number, got '8'"),
        (dict(freeze="head"), "freeze must be a list, each of text, got 'head'"),
        (dict(task="detect"), "task must be 'classify', got 'detect'"),
        (dict(optim=None), "optim must be a table of settings, got None"),
        (dict(optim=dict(betas=[0.9])), r"optim\.betas must be a list of 2, each a number"),
        (dict(optim=dict(schedule="flat")), r"optim\.schedule must be 'cosine' or 'linear' or 'multistep', got 'flat'"),
        (dict(optim=dict(schedule="multistep", milestones=[9, 3])), r"optim\.milestones must rise, got 9, 3"),
        (dict(runtime=dict(compile=1)), r"runtime\.compile must be true or false, got 1"),
        (dict(pretrained=True, weights="a.pth"), "either pretrained or weights"),
        (dict(model="resnet18", stem_stride=2), "stem_stride is an option of OverLoCK"),
        (dict(runtime=dict(strategy="fsdp"), ema=dict(decay=0.9)), "not available with fsdp"),
        (dict(runtime=dict(strategy="fsdp", precision="fp16")), "fp16 is not available with fsdp"),
        (dict(epoch=3), "unknown setting epoch; did you mean epochs"),
        (dict(optim=dict(learning=3)), r"unknown setting optim\.learning; known are base_batch_size, betas"),
        (dict(safety=dict(unreadible=3)), r"unknown setting safety\.unreadible; did you mean safety\.unreadable"),
    ],
)
def test_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict({"data": "digits", **setting})


@pytest.mark.parametrize(
    ("recipe", "kind"), [("small", TrainConfig), ("small_detect", DetectConfig), ("upernet_t", SegmentConfig)]
)
def test_every_field_has_a_line_of_help(recipe, kind):
    from overlock.cli import make_parser

    text = " ".join(make_parser(["train", recipe])[1]["train"].format_help().split())
    own = {field.name for field in dataclasses.fields(kind)}
    groups = {group: kind for group, kind in GROUPS.items() if group in own}
    names = [name for name in own if name not in groups]
    names += [f"{group}.{field.name}" for group, kind in groups.items() for field in dataclasses.fields(kind)]
    for name in names:
        _, found, rest = text.rpartition(f" --{name} ")
        assert found
        words = rest.split("(type:")[0].split("(required, type:")[0]
        assert len(words.split()) >= 4, name


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_whole_and_survive_the_file(name):
    config = RECIPES[name]("somewhere")
    assert RECIPES[name].__doc__
    assert type(config) is CONFIGS[config.task]
    assert type(config).from_dict(config.to_dict()) == config
    assert config.model in VARIANTS or config.model in timm.list_models("overlock_*_*")


@pytest.mark.parametrize(
    ("size", "rate", "others"), [("t", 0.2, (0.2, 0.2)), ("s", 0.4, (0.4, 0.3)), ("b", 0.6, (0.6, 0.5))]
)
def test_dense_recipes_are_the_papers(size, rate, others):
    for name, epochs, lr, drops in (
        (f"mask_rcnn_{size}_1x", 12, 2e-4, (8, 11)),
        (f"mask_rcnn_{size}_3x", 36, 1e-4, (27, 33)),
        (f"cascade_{size}_3x", 36, 1e-4, (27, 33)),
    ):
        config = RECIPES[name]("somewhere")
        assert (config.model, config.epochs, config.drop_path) == (f"overlock_{size}", epochs, rate)
        assert (config.batch_size, config.optim.peak(16), config.optim.milestones) == (16, lr, drops)
        assert (config.optim.warmup_steps, config.optim.warmup_lr) == (500, pytest.approx(lr / 1000))
        assert (config.optim.weight_decay, config.min_size, config.max_size) == (0.05, 800, 1333)
        assert config.multi_scale == (() if name.endswith("1x") else tuple(range(480, 801, 32)))
        assert config.detector == ("cascade_mask_rcnn" if name.startswith("cascade") else "mask_rcnn")
    config = RECIPES[f"upernet_{size}"]("somewhere")
    assert config.epochs * config.epoch_steps == 160_000
    assert (config.drop_path, config.optim.peak(16), config.optim.weight_decay) == (others[1], 6e-5, 0.01)
    assert (config.optim.warmup_steps, config.optim.schedule, config.optim.min_lr) == (1500, "linear", 0)
    assert (config.reduce_zero_label, config.crop, config.scale, config.ratio) == (True, 512, (2048, 512), (0.5, 2.0))


@pytest.mark.parametrize("size", ["xt", "t", "s", "b"])
def test_imagenet_recipes_are_the_papers(size):
    config = RECIPES[f"imagenet_{size}"]("somewhere")
    assert (config.model, config.epochs, config.batch_size) == (f"overlock_{size}", 300, 2048)
    assert config.optim.peak(config.batch_size) == 2e-3
    assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.05)
    assert (config.optim.warmup_epochs, config.optim.warmup_lr, config.optim.min_lr) == (5, 1e-6, 1e-5)
    assert config.optim.clip_norm == 5
    assert config.augment.rand_augment == "rand-m9-mstd0.5-inc1"
    assert (config.augment.color_jitter, config.augment.erasing, config.augment.interpolation) == (0.4, 0.25, "random")
    loss = config.loss
    assert (loss.mixup, loss.cutmix, loss.switch_prob, loss.label_smoothing, loss.aux_weight) == (
        0.8, 1.0, 0.5, 0.1, 0.4,
    )  # fmt: skip
    assert config.ema.decay == 0.9999
    assert config.runtime.sync_bn
    assert config.drop_path is None  # the size's own
    assert VARIANTS[config.model].drop_path == dict(xt=0.1, t=0.15, s=0.4, b=0.5)[size]
    assert VARIANTS[config.model].crop_pct == dict(xt=0.925, t=0.95, s=0.95, b=0.975)[size]


def test_the_ablation_differs_in_its_length_alone():
    full, short = (RECIPES[name]("somewhere").to_dict() for name in ("imagenet_xt", "ablation"))
    assert short == full | dict(epochs=120, output="runs/ablation")
