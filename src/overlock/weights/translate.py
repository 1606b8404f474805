"""A state dict in the names and shapes of a model: ours or the authors', whole or a part of something larger."""

from __future__ import annotations

import re
from collections.abc import Mapping

from timm.models import adapt_input_conv
from torch import Tensor, nn

from overlock.blocks import ContMixBlock
from overlock.layers import DilatedRepConv
from overlock.weights.head_names import heads_from_official
from overlock.weights.names import from_official
from overlock.weights.parts import OURS, Parts, Place, find_network, take_apart

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict")
_NESTED = (*AVERAGED, "state_dict", "model", "module")
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning or features_only
_COUNTERS = ("n_averaged", "steps")  # beside the weights in torch's AveragedModel and mmengine's


def unwrap(checkpoint: object) -> dict[str, Tensor]:
    """The state dict in a checkpoint: as it is, nested, averaged (preferred), or prefixed by a wrapper's name.

    Raises:
        ValueError: where there is none.
    """
    for key in _NESTED:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"a checkpoint must hold a state dict, found {type(checkpoint).__name__}")
    state = {str(name): tensor for name, tensor in checkpoint.items() if isinstance(tensor, Tensor)}
    if not state:
        raise ValueError("the checkpoint holds no tensors")
    if all(name in _COUNTERS or name.startswith("module.") for name in state):
        state = {name: tensor for name, tensor in state.items() if name not in _COUNTERS}
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def translate(checkpoint: Mapping[str, object], model: nn.Module, *, strict: bool = True) -> dict[str, Tensor]:
    """A checkpoint in the names and shapes of a model: timm's filter function for our models.

    The network in the file becomes the network in the model, wherever either has it: alone, under another framework's
    prefix, in a :class:`overlock.Pyramid`, a detector or a segmenter. The norms of a pyramid's features and the head of
    a detector or segmenter go along where the model has their like. What the model has no place for (auxiliary head,
    another kind of head) is left out; what the file may lack (a new classifier, norms, a head) is left to the model.
    Only the norms may not be left out: a pyramid's stage 3 was trained on normalised features (see there).

    Args:
        checkpoint: of the authors, of timm or ours; nested, averaged or prefixed.
        model: a model with our network in it, or a :class:`overlock.ContMixBlock`; of others the very names.
        strict: refuse a head of the model's kind that does not fit, and norms without a place; else they are left out.

    Raises:
        ValueError: naming the first names that are missing, left over, or of another shape.
    """
    return fit(unwrap(checkpoint), model, strict=strict)[0]


def fit(state: Mapping[str, Tensor], model: nn.Module, *, strict: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """As :func:`translate`, of a plain state dict, and the names of what is left out of it."""
    target = model.state_dict()
    place, given_place = find_network(target), find_network(state)
    if place is None:
        if given_place is not None:
            raise ValueError("these are weights of OverLoCK; this model has another network")
        return _fit_others(state, model), []
    given = take_apart(state, given_place or Place("", None, official=False))
    if strict and place.pyramid is None and given.pyramid:
        raise ValueError(
            f"the file is that of a dense backbone, and this model has no place for its norms (first: "
            f"{next(iter(given.pyramid))}); load it into overlock.Pyramid, or start a training from it (--weights)"
        )
    network, pyramid = _fit_backbone(given, model, place)
    head = _fit_head(given, target, place, strict=strict)
    left_out = [
        name
        for part, used in ((given.network, network), (given.pyramid, pyramid), (given.rest, head))
        for name in part
        if name not in used
    ]
    fitted = {place.network + name: tensor for name, tensor in network.items()}
    return fitted | {f"{place.pyramid}{name}": tensor for name, tensor in pyramid.items()} | head, left_out


def _fit_others(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Of a model without our network."""
    target = model.state_dict()
    if isinstance(model, ContMixBlock) and 2 * len(state.keys() & target.keys()) < len(target):
        state = from_official(state, "block")  # of our names at most a few are theirs too
    fitted = _merge_to_form(state, model)
    _check(target, fitted, [name for name in target if name not in fitted])
    return fitted


def _fit_backbone(given: Parts, model: nn.Module, place: Place) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network and, where the model has them, the norms of its features."""
    module = model.get_submodule(place.network.removesuffix("."))
    network = _fit_network(_merge_to_form(given.network, module), module.state_dict())
    if place.pyramid is None:
        return network, {}
    own = take_apart(model.state_dict(), place).pyramid
    norms = {name: tensor for name, tensor in given.pyramid.items() if name in own or not _OVERVIEW.match(name)}
    _check(own, norms, [name for name in own if norms and name not in norms and not _OVERVIEW.match(name)])
    return network, norms


def _fit_head(given: Parts, target: Mapping[str, Tensor], place: Place, *, strict: bool) -> dict[str, Tensor]:
    """The head of a dense model, if the file has one of its kind."""
    own = {name: tensor for name, tensor in target.items() if not name.startswith(place.root)}
    head = heads_from_official(given.rest)
    if not strict:
        return {name: x for name, x in head.items() if name in own and x.shape == own[name].shape}
    if not own.keys() & head.keys():
        return {}
    _check(own, head, [name for name in own if name not in head and not name.startswith("auxiliary_head.")])
    return head


def _merge_to_form(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Merge the training form's branches where the model is built merged."""
    state = dict(state)
    for name, module in model.named_modules():
        prefix = f"{name}.large." if name else "large."
        if not isinstance(module, DilatedRepConv) or not module.merged or prefix + "weight" not in state:
            continue
        if prefix + "bias" in state:
            continue
        root = prefix.removesuffix("large.")
        full = DilatedRepConv(module.large.in_channels, module.large.kernel_size[0]).double()
        wanted = {root + part: tensor.shape for part, tensor in full.state_dict().items()}
        misfits = [part for part, shape in wanted.items() if part not in state or state[part].shape != shape]
        if misfits:
            raise ValueError(
                f"{len(misfits)} tensors that make up {prefix}weight are missing or of another shape"
                f" (first: {', '.join(misfits[:3])})"
            )
        full.load_state_dict({part.removeprefix(root): state.pop(part) for part in wanted})
        full.reparameterize()
        state.update({root + part: tensor for part, tensor in full.state_dict().items()})
    return state


_OVERVIEW = re.compile(r"overview_(norm|proj|scale)\.")
_OPTIONAL = re.compile(r"(aux_head|head)\.")
_CLASSIFIER = re.compile(r"(aux_head|head)\.fc\.(weight|bias)$")


def _fit_network(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what the network has no place for and replace new classifiers; raise for any other difference."""
    fitted = {name: tensor for name, tensor in state.items() if name in target or not _OPTIONAL.match(name)}
    same_classes = all(fitted[n].shape == target[n].shape for n in fitted if n in target and _CLASSIFIER.match(n))
    if not same_classes:
        fitted = {name: tensor for name, tensor in fitted.items() if not _CLASSIFIER.match(name)}
    _check(target, fitted, [name for name in target if name not in fitted and not _OPTIONAL.match(name)])
    return fitted


def _check(target: Mapping[str, Tensor], given: Mapping[str, Tensor], missing: list[str]) -> None:
    """Raise for what is missing, left over, or of another shape; channels of images are seen to later."""
    left_over = [name for name in given if name not in target]
    other = [
        f"{name} {tuple(given[name].shape)} where the model has {tuple(target[name].shape)}"
        for name in given
        if name in target and given[name].shape != target[name].shape and name != OURS
    ]
    problems = [
        f"{len(names)} {what} (first: {', '.join(names[:3])})"
        for what, names in (("missing", missing), ("left over", left_over), ("of another shape", other))
        if names
    ]
    if problems:
        merged = any(".branches." in name for name in missing) and any(n.endswith(".large.bias") for n in left_over)
        hint = ". The file is in the merged form; build the model with deploy=True" if merged else ""
        raise ValueError(f"the weights do not fit the model: {'; '.join(problems)}{hint}")


def adapt_channels(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit the first convolution of weights for colours to a model of other channels, as timm does.

    Raises:
        ValueError: for weights of other channels than colours.
    """
    target = model.state_dict()
    for name in [name for name in state if name.endswith(OURS) and name in target]:
        given, wanted = state[name].shape[1], target[name].shape[1]
        if given == wanted:
            continue
        if given != 3:
            raise ValueError(f"the weights are for images of {given} channels, the model for {wanted}; build it alike")
        state = {**state, name: adapt_input_conv(wanted, state[name])}
    return state
