"""What settings come to in a run, where that is not what they seem to say: told before it begins."""

from __future__ import annotations

from overlock.data.augmentation import Augmentation
from overlock.training.config import LossConfig, OptimConfig, RunConfig, TrainConfig
from overlock.training.optim import wanted_warmup

LEFT = 0.5  # share of the first weights in their average from which on it is told


def tell_effects(config: RunConfig, *, steps_per_epoch: int, images: int) -> tuple[str, ...]:
    """Notes on settings that have no effect, or another one than their names say.

    Args:
        config: of the run.
        steps_per_epoch: of the training.
        images: to train on.
    """
    notes = _of_schedule(config, steps_per_epoch) + _of_average(config, config.epochs * steps_per_epoch)
    if config.batch_size > images:
        notes.append(f"batch_size {config.batch_size} is more than the {images} images: a step takes some repeatedly")
    if isinstance(config, TrainConfig):
        notes += _of_images(config)
    return tuple(notes)


def _of_schedule(config: RunConfig, steps_per_epoch: int) -> list[str]:
    optim, steps, notes = config.optim, config.epochs * steps_per_epoch, []
    wanted, half = wanted_warmup(config, steps_per_epoch), round(steps / 2)
    if wanted > half:
        notes.append(f"the warm-up of {wanted} steps is cut to {half}, half of the run's {steps}")
    peak = optim.peak(config.batch_size)
    if wanted and steps > 1 and optim.warmup_lr > peak:
        notes.append(f"optim.warmup_lr {optim.warmup_lr:g} is above the peak rate {peak:g}: the warm-up begins at that")
    late = [epoch for epoch in optim.milestones if epoch >= config.epochs]
    if late:
        listed = ", ".join(f"{epoch:g}" for epoch in late)
        notes.append(f"optim.milestones {listed}: not before the end of the {config.epochs} epochs, so of no effect")
    if not optim.takes_betas:
        notes += _without_effect(optim, OptimConfig(), "optim.", ("betas", "eps"), f"the optimiser {optim.name}")
    return notes


def _of_average(config: RunConfig, steps: int) -> list[str]:
    ema = config.ema
    if not ema.decay:
        return ["ema.warmup has no effect without ema.decay"] if ema.warmup else []
    left = ema.decay**steps
    if ema.warmup or left < LEFT:
        return []
    return [
        f"the average of the weights, which is tested and kept, is {100 * left:.0f} % the first weights after {steps} "
        f"steps with ema.decay {ema.decay:g}; lower it, or set ema.warmup"
    ]


def _of_images(config: TrainConfig) -> list[str]:
    notes = []
    if config.augment.padding:
        names = ("scale", "ratio", "interpolation")
        notes += _without_effect(config.augment, Augmentation(), "augment.", names, "augment.padding")
    loss = config.loss
    if not (loss.mixup or loss.cutmix):
        notes += _without_effect(loss, LossConfig(), "loss.", ("mix_prob", "switch_prob"), "no loss.mixup or cutmix")
    elif not (loss.mixup and loss.cutmix):
        notes += _without_effect(loss, LossConfig(), "loss.", ("switch_prob",), "only one of loss.mixup and cutmix")
    return notes


def _without_effect(given: object, default: object, prefix: str, names: tuple[str, ...], reason: str) -> list[str]:
    changed = [name for name in names if getattr(given, name) != getattr(default, name)]
    return [f"{prefix}{name} has no effect with {reason}" for name in changed]
