"""Descriptions of modules, part by part, and the reason why a module is not as described.

A fused form does the work of a module as its class builds it. Networks are changed by hand, though: an activation
swapped, a layer wrapped, a hook added. A check looks for anything that a form would not do, and says where it is. A
module that fails it keeps the form that it has.

A check is called with a module (or None, where a part is absent) and with its name, and gives None or the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import nn

Reason: TypeAlias = str | None
Check: TypeAlias = Callable[[nn.Module | None, str], Reason]
Expected: TypeAlias = Callable[[Any], Mapping[str, object]]  # the settings that a module of a class ought to have
Rule: TypeAlias = Callable[[Any], Reason]  # what else a module of a class ought to keep

BY_CALL = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _nothing(_: object) -> Mapping[str, object]:
    return {}


def _no_rule(_: object) -> Reason:
    return None


def kind(
    *classes: type[nn.Module], tensors: tuple[str, ...] = (), optional: tuple[str, ...] = (),
    expected: Expected = _nothing, rule: Rule = _no_rule, parts: Mapping[str, Check] | None = None,
) -> Check:  # fmt: skip
    """Modules of exactly one of some classes, with exactly some parts.

    Args:
        classes: that it may be of; not their subclasses, which may do something else.
        tensors: parameters and buffers that it must have.
        optional: those that it may have besides.
        expected: its settings, by the names of its attributes.
        rule: the reason why it cannot be taken nevertheless, where there is one.
        parts: its children, by name.
    """
    checks = parts or {}

    def why_not(module: nn.Module | None, name: str) -> Reason:
        if type(module) not in classes:
            return f"{name} is {_class_of(module)}, not {' or '.join(known.__name__ for known in classes)}"
        assert module is not None
        reason = _why_changed(module) or _why_other_tensors(module, tensors, optional)
        besides = ", ".join(module._modules.keys() - checks.keys())
        if reason is None and besides:
            reason = f"has the parts {besides} besides"
        reason = reason or _why_other_settings(module, expected(module))
        if reason is not None:
            return f"{name} {reason}"
        reason = _first(check(module._modules.get(part), f"{name}.{part}") for part, check in checks.items())
        return reason or _named(name, rule(module))

    return why_not


def each(container: type[nn.Module], check: Check) -> Check:
    """Containers, none of them empty, whose children all pass a check."""

    def why_not(module: nn.Module | None, name: str) -> Reason:
        if type(module) is not container:
            return f"{name} is {_class_of(module)}, not {container.__name__}"
        if not module._modules:
            return f"{name} is empty"
        reason = _named(name, _why_changed(module))
        return reason or _first(check(x, f"{name}.{part}") for part, x in module._modules.items())

    return why_not


def alternating(container: type[nn.Module], first: Check, second: Check) -> Check:
    """Containers whose children pass two checks in turn, the first of them at both ends."""

    def why_not(module: nn.Module | None, name: str) -> Reason:
        if type(module) is not container:
            return f"{name} is {_class_of(module)}, not {container.__name__}"
        if len(module._modules) % 2 == 0:
            return f"{name} has {len(module._modules)} parts, not an odd number"
        checks = [(first, second)[i % 2] for i in range(len(module._modules))]
        parts = zip(checks, module._modules.items(), strict=True)
        reason = _named(name, _why_changed(module))
        return reason or _first(check(x, f"{name}.{part}") for check, (part, x) in parts)

    return why_not


def absent(module: nn.Module | None, name: str) -> Reason:
    """The check of a part that is not there."""
    return None if module is None else f"{name} is {_class_of(module)}, not absent"


def anything(_module: nn.Module | None, _name: str) -> Reason:
    """The check of a part that a form leaves alone."""
    return None


def one_of(*checks: Check) -> Check:
    """What passes any of some checks."""

    def why_not(module: nn.Module | None, name: str) -> Reason:
        reasons = [check(module, name) for check in checks]
        return None if None in reasons else "; ".join(filter(None, reasons))

    return why_not


def _first(reasons: Iterable[Reason]) -> Reason:
    return next(filter(None, reasons), None)


def _named(name: str, reason: Reason) -> Reason:
    return None if reason is None else f"{name} {reason}"


def _class_of(module: nn.Module | None) -> str:
    return "absent" if module is None else type(module).__name__


def _why_changed(module: nn.Module) -> Reason:
    """What a module does when it is called beside its class's ``forward``."""
    if any(getattr(module, hooks) for hooks in BY_CALL):
        return "has hooks, which would no longer be called"
    return "has a forward method of its own" if "forward" in vars(module) else None


def _why_other_tensors(module: nn.Module, needed: tuple[str, ...], optional: tuple[str, ...]) -> Reason:
    own = {name for name, x in (*module._parameters.items(), *module._buffers.items()) if x is not None}
    lacking, besides = set(needed) - own, own - {*needed, *optional}
    if lacking:
        return f"has no {', '.join(sorted(lacking))}"
    return f"has {', '.join(sorted(besides))} besides" if besides else None


def _why_other_settings(module: nn.Module, expected: Mapping[str, object]) -> Reason:
    for name, value in expected.items():
        if getattr(module, name, None) != value:
            return f"has {name} {getattr(module, name, None)!r}, not {value!r}"
    return None
