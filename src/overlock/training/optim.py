"""Optimiser, schedule and average of the weights: timm's."""

from __future__ import annotations

from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from overlock.network import OverLoCK
from overlock.training.config import SUB_NETWORKS, EmaConfig, OptimConfig, RunConfig


def make_optimizer(network: nn.Module, config: OptimConfig, *, batch_size: int) -> Optimizer:
    """The optimiser with timm's groups: no decay of biases, norms and 1-D parameters; layer-wise rates if asked for.

    Raises:
        ValueError: for an optimiser that timm does not know, or one that does not take the settings.
    """
    options = dict(betas=tuple(config.betas), eps=config.eps) if config.takes_betas else {}
    try:
        return create_optimizer_v2(
            network,
            opt=config.name,
            lr=config.peak(batch_size),
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **options,
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"optim.name {config.name!r} cannot be used ({error}); try adamw") from None


def wanted_warmup(config: RunConfig, steps_per_epoch: int) -> int:
    """Steps of the warm-up as the settings have it."""
    given = config.optim.warmup_steps
    return round(config.optim.warmup_epochs * steps_per_epoch) if given is None else given


def make_schedule(optimizer: Optimizer, config: RunConfig, *, steps_per_epoch: int) -> Scheduler:
    """Linear warm-up and a fall over all steps; the learning rate of a step follows from its number alone.

    The cosine begins after the warm-up; the others are as they would be without it.
    """
    optim, steps = config.optim, config.epochs * steps_per_epoch
    warmup = min(wanted_warmup(config, steps_per_epoch), round(steps / 2))
    common: dict[str, Any] = dict(
        warmup_t=warmup,
        warmup_lr_init=min(optim.warmup_lr, optim.peak(config.batch_size)),
        warmup_prefix=optim.schedule == "cosine",
        t_in_epochs=False,
    )
    if optim.schedule == "multistep":
        milestones = [round(epoch * steps_per_epoch) + 1 for epoch in optim.milestones]  # timm drops a step early
        return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=0.1, **common)
    if optim.schedule == "linear":
        return PolyLRScheduler(optimizer, t_initial=steps, power=1.0, lr_min=optim.min_lr, **common)
    return CosineLRScheduler(optimizer, t_initial=max(1, steps - warmup), lr_min=optim.min_lr, **common)


def make_average(network: nn.Module, config: EmaConfig) -> ModelEmaV3 | None:
    """The moving average of all weights and norm statistics, a network of its own; None where it is off."""
    return ModelEmaV3(network, decay=config.decay, use_warmup=config.warmup) if config.decay else None


def freeze(network: nn.Module, prefixes: tuple[str, ...]) -> list[nn.Module]:
    """Stop the training of the parameters that begin with a prefix, in the network or in the OverLoCK under its head.

    Returns:
        The modules under the prefixes, which must stay in evaluation mode, or their norms' statistics would change.

    Raises:
        ValueError: for a prefix that no parameter has, and where nothing is left to train.
    """
    roots = ["", *(f"{name}." for name, module in network.named_modules() if name and isinstance(module, OverLoCK))]
    frozen = {f"{root}{prefix}": prefix for root in roots for prefix in prefixes}
    found = set()
    for name, parameter in network.named_parameters():
        for path, prefix in frozen.items():
            if name == path or name.startswith(f"{path}."):
                found.add(prefix)
                parameter.requires_grad_(False)
    for prefix in prefixes:
        if prefix not in found:
            raise ValueError(
                f"freeze: no parameter's name begins with {prefix!r}; OverLoCK has {', '.join(SUB_NETWORKS)}"
            )
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError("freeze leaves nothing to train; name fewer parts")
    return [module for name, module in network.named_modules() if name in frozen]
