"""Settings that do not do what they seem to are told of."""

from __future__ import annotations

import pytest

from overlock.training import RECIPES, TrainConfig
from overlock.training.effects import tell_effects


def notes(*, steps=100, images=10_000, **settings) -> tuple[str, ...]:
    return tell_effects(TrainConfig.from_dict({"data": "x", **settings}), steps_per_epoch=steps, images=images)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(epochs=4), "the warm-up of 500 steps is cut to 200, half of the run's 400"),
        (dict(epochs=4, optim=dict(warmup_steps=300)), "the warm-up of 300 steps is cut to 200"),
        (dict(optim=dict(warmup_lr=0.1)), "optim.warmup_lr 0.1 is above the peak rate 6.25e-05: the warm-up begins at"),
        (dict(optim=dict(schedule="multistep", milestones=[8, 400])), "optim.milestones 400: not before the end"),
        (dict(optim=dict(name="sgd", betas=[0.9, 0.95])), "optim.betas has no effect with the optimiser sgd"),
        (dict(epochs=10, ema=dict(decay=0.9999)), "is 90 % the first weights after 1000 steps with ema.decay 0.9999"),
        (dict(ema=dict(warmup=True)), "ema.warmup has no effect without ema.decay"),
        (dict(augment=dict(padding=4, scale=[0.5, 1.0])), "augment.scale has no effect with augment.padding"),
        (dict(loss=dict(mix_prob=0.5)), "loss.mix_prob has no effect with no loss.mixup or cutmix"),
        (dict(loss=dict(mixup=1.0, switch_prob=0.1)), "loss.switch_prob has no effect with only one of"),
        (dict(batch_size=64, images=12), "batch_size 64 is more than the 12 images: a step takes some repeatedly"),
    ],
)
def test_told(settings, expected):
    assert any(expected in note for note in notes(**{"epochs": 300, **settings}))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_mean_what_they_say(name):
    assert tell_effects(RECIPES[name]("x"), steps_per_epoch=1250, images=160_000) == ()
