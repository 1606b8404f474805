"""Derivatives of the operators: the first ones of training by kernels, all others by the plain form.

A plain form is the same function in operations that PyTorch differentiates itself, as often as asked and in forward
mode too. It runs for gradients of gradients, where an input carries a tangent of forward mode, and in the transforms of
``torch.func``, which take no function of autograd's below an operator. Ordinary training never meets it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from overlock.ops.checks import check_gradient
from overlock.ops.registration import LIBRARY, UNCHECKED, operator_of, register, without_autocast


def register_autograd(
    name: str, backward: Callable[..., Any], *, setup_context: Callable[..., None], plain: Callable[..., Any]
) -> None:
    """As ``torch.library.register_autograd``, and the plain form for tangents, which that would drop in silence.

    Args:
        name: of the operator.
        backward, setup_context: as PyTorch's.
        plain: the plain form, called with the operator's arguments.
    """
    operator: Any = operator_of(name)
    by_backward = make_autograd_impl(operator, Info(backward, setup_context))

    def autograd(keyset: Any, *inputs: Any) -> Any:
        if _is_transformed(inputs):
            return _without_autocast(plain, inputs)
        return by_backward(keyset, *inputs)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def register_plain_autograd(name: str, plain: Callable[..., Any]) -> None:
    """Let autograd differentiate an operator by its plain form alone."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.others = tuple(None if isinstance(x, Tensor) else x for x in inputs)

    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        wanted = [i for i, is_wanted in enumerate(ctx.needs_input_grad) if is_wanted is True]  # no list of tensors
        gradients = pull_back(plain, inputs, cotangents if len(cotangents) > 1 else cotangents[0], wanted)
        found = dict(zip(wanted, gradients, strict=True))
        return tuple(found.get(i, _nothing_for(x)) for i, x in enumerate(inputs))

    register_autograd(name, backward, setup_context=setup_context, plain=plain)


def _nothing_for(x: Any) -> Any:
    """No gradient, for a list of tensors as a list."""
    return [None for _ in x] if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor) else None


def register_no_gradients(name: str) -> None:
    """Let autograd say that there are none, where an exported graph of a fused model is asked for them."""

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"overlock::{name} is for inference and has no gradients;"
            " export or compile the model itself, or overlock.fuse(model, kernels=False)"
        )

    register_autograd(name, refuse, setup_context=lambda *_, **__: None, plain=refuse)


def register_backward(
    name: str, arguments: str, run: Callable[..., Any], *, tensors: int, plain: Callable[..., Tensor],
    check: Callable[..., None], result_shape: Callable[..., Sequence[int]], backend: Callable[[], str],
) -> None:  # fmt: skip
    """Define ``overlock::name_backward`` and let autograd take it for the gradients of ``overlock::name``.

    Args:
        name: of the operator.
        arguments: its arguments, tensors first, then numbers.
        run: called with the result's gradient, the backend and the arguments; returns a gradient for each tensor, empty
            for None.
        tensors: how many arguments are tensors or None.
        plain: the operator's plain form, for all other derivatives.
        check: of the operator's arguments.
        result_shape: of the operator, from its arguments.
        backend: called with the operator. What it returns is the gradients' backend too, which may be computed in
            another thread and context.
    """

    def fake(_grad: Tensor, _backend: str, *inputs: Any) -> Any:
        like = tuple(inputs[0].new_empty(0) if x is None else torch.empty_like(x) for x in inputs[:tensors])
        return like if tensors > 1 else like[0]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
        ctx.save_for_backward(*inputs[:tensors])
        ctx.numbers, ctx.backend = inputs[tensors:], backend()

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        computed = call_in_backward(call, grad, ctx.backend, *saved, *ctx.numbers)
        computed = computed if tensors > 1 else (computed,)
        wanted = (g if x is not None else None for g, x in zip(computed, saved, strict=True))
        return *wanted, *(None for _ in ctx.numbers)

    def plain_backward(grad: Tensor, _backend: str, *inputs: Any) -> Any:
        given = [i for i, x in enumerate(inputs[:tensors]) if x is not None]
        found = dict(zip(given, pull_back(plain, inputs, grad, given), strict=True))
        like = tuple(found.get(i, grad.new_empty(0)) for i in range(tensors))
        return like if tensors > 1 else like[0]

    def check_all(grad: Tensor, _backend: str, *inputs: Any) -> None:
        check(*inputs)
        check_gradient(f"{name}_backward", grad, result_shape(*inputs))

    results = ", ".join(["Tensor"] * tensors)
    schema = f"(Tensor grad, str backend, {arguments}) -> ({results})"
    register(f"{name}_backward", schema, run, fake, check=check_all)
    call = operator_of(f"{name}_backward")
    register_autograd(name, backward, setup_context=setup_context, plain=plain)
    register_plain_autograd(f"{name}_backward", plain_backward)


def call_in_backward(operator: Callable[..., Any], *inputs: Any) -> Any:
    """Call an operator in a backward pass: past autograd, unless the gradients are to be differentiated again.

    Plain tensors go to its implementation at once. Forward has checked them and autograd the gradient, and the way
    through PyTorch's dispatcher takes as long as a small kernel. Whoever watches or replaces operations (modes,
    subclasses, transforms, and with them all tracing) meets the operator.
    """
    if torch.is_grad_enabled():
        return operator(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return (UNCHECKED[operator] if _are_plain(inputs) else operator)(*inputs)


def _are_plain(inputs: Sequence[Any]) -> bool:
    """Whether a call has ordinary tensors, and no mode, transform or profiler is on."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not torch.autograd._profiler_enabled() and all(map(_is_plain, inputs))


def _is_plain(x: Any) -> bool:
    """Whether an argument is no tensor, or one that its device's kernels take as it is: no subclass, no batch."""
    if isinstance(x, list | tuple):
        return all(map(_is_plain, x))
    return not isinstance(x, Tensor) or torch._C._dispatch_keys(x).raw_repr() == _plain_keys(x.device.type)


@functools.cache
def _plain_keys(device: str) -> int:
    return torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr()


def pull_back(
    function: Callable[..., Any], inputs: Sequence[Any], cotangents: Any, wanted: Sequence[int]
) -> tuple[Tensor, ...]:
    """Gradients of a function of plain operations, to be differentiated again like any others.

    Args:
        function: called with the inputs.
        inputs: tensors and others.
        cotangents: gradients of the results.
        wanted: positions of the inputs whose gradients are returned.
    """

    def of_wanted(*tensors: Tensor) -> Any:
        arguments = list(inputs)
        for position, tensor in zip(wanted, tensors, strict=True):
            arguments[position] = tensor
        return _without_autocast(function, arguments)

    return torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))[1](cotangents)


def _is_transformed(inputs: Sequence[Any]) -> bool:
    """Whether a transform of torch.func's differentiates the call, or an input carries a tangent of forward mode."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if forward_ad._current_level < 0:  # no forward mode, as nearly always
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def _without_autocast(function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Call a function whose inputs have the types that autocast gave them, or are not to get."""
    device = next(x.device.type for x in inputs if isinstance(x, Tensor))
    with without_autocast(device):
        return function(*inputs)
