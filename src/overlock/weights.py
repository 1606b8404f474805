"""Weights: the authors' release files, their names and ours, and loading that says what does not fit."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from overlock.layers import DilatedRepConv
from overlock.unpickling import read_saved

RELEASE = "https://github.com/LMMMEng/OverLoCK/releases/download/v1/"

# Names, ours and the authors', from the outside in: a rule holds for the start of what is left of a name, and what
# follows it is translated by the rules of the part that the rule enters. "{i}" is a number, the same on both sides.
_REPCONV = [
    ("large", "lk_origin"),
    ("norm", "origin_bn"),
    ("branches.k{i}_r{i}.conv", "dil_conv_k{i}_{i}"),
    ("branches.k{i}_r{i}.norm", "dil_bn_k{i}_{i}"),
]
_FFN_BASIC = [("expand", "proj.4"), ("local", "proj.6"), ("norm", "proj.7"), ("project", "proj.8")]
_FFN_DYNAMIC = [("expand", "mlp.0"), ("local", "mlp.2"), ("norm", "mlp.3"), ("project", "mlp.4")]
_BASIC_BLOCK = [
    ("local", "dwconv"),
    ("norm", "proj.0"),
    *((f"large_kernel.conv.{ours}", f"proj.1.{theirs}") for ours, theirs in _REPCONV),
    ("large_kernel.norm", "proj.2"),
    ("se.fc1", "proj.3.proj.1"),
    ("se.fc2", "proj.3.proj.3"),
    *((f"ffn.{ours}", theirs) for ours, theirs in _FFN_BASIC),
    ("residual", "ls"),
]
_AGGREGATOR = [
    ("mixer.query.conv", "weight_query.0"),
    ("mixer.query.norm", "weight_query.1"),
    ("mixer.key.conv", "weight_key.1"),
    ("mixer.key.norm", "weight_key.2"),
    ("mixer.kernels", "weight_proj"),
    ("mixer.rpb_small", "rpb1"),
    ("mixer.rpb_large", "rpb2"),
    *((f"large_kernel.conv.{ours}", f"lepe.0.{theirs}") for ours, theirs in _REPCONV),
    ("large_kernel.norm", "lepe.1"),
    ("se.fc1", "se_layer.proj.1"),
    ("se.fc2", "se_layer.proj.3"),
    ("gate.conv", "gate.0"),
    ("gate.norm", "gate.1"),
    ("proj.norm", "proj.0"),
    ("proj.conv", "proj.1"),
]
_MIXER_BLOCK = [
    ("local1", "dwconv1"),
    ("norm1", "norm1"),
    *((f"mixer.aggregator.{ours}", theirs) for ours, theirs in _AGGREGATOR),
    ("residual1", "ls1"),
    ("local2", "dwconv2"),
    ("norm2", "norm2"),
    *((f"ffn.{ours}", theirs) for ours, theirs in _FFN_DYNAMIC),
    ("residual2", "ls2"),
]
_DYNAMIC_BLOCK = [
    ("context_update.alpha", "x_scale"),
    ("context_update.beta", "h_scale"),
    ("mixer.fusion.local.conv", "fusion.0"),
    ("mixer.fusion.local.norm", "fusion.1"),
    ("mixer.fusion.project", "fusion.3"),
    ("mixer.fusion.norm", "fusion.4"),
    ("mixer.aggregator.mixer.out.conv", "dyconv_proj.0"),
    ("mixer.aggregator.mixer.out.norm", "dyconv_proj.1"),
    *_MIXER_BLOCK,
]
_CONTMIX_BLOCK = [
    ("mixer.aggregator.mixer.value.conv", "weight_value.0"),
    ("mixer.aggregator.mixer.value.norm", "weight_value.1"),
    ("mixer.aggregator.mixer.out.conv", "fusion_proj.0"),
    ("mixer.aggregator.mixer.out.norm", "fusion_proj.1"),
    *_MIXER_BLOCK,
]
_NETWORK = [
    *((f"base_net.stages.0.embed.{2 * i}.conv", f"patch_embed1.{3 * i}") for i in range(4)),
    *((f"base_net.stages.0.embed.{2 * i}.norm", f"patch_embed1.{3 * i + 1}") for i in range(4)),
    *((f"base_net.stages.{i}.embed.conv", f"patch_embed{i + 1}.0") for i in (1, 2)),
    *((f"base_net.stages.{i}.embed.norm", f"patch_embed{i + 1}.1") for i in (1, 2)),
    *(
        (f"base_net.stages.{i}.blocks.{{i}}.{ours}", f"blocks{i + 1}.{{i}}.{theirs}")
        for i in range(3)
        for ours, theirs in _BASIC_BLOCK
    ),
    ("overview_net.stage.embed.conv", "patch_embed4.0"),
    ("overview_net.stage.embed.norm", "patch_embed4.1"),
    *((f"overview_net.stage.blocks.{{i}}.{ours}", f"blocks4.{{i}}.{theirs}") for ours, theirs in _BASIC_BLOCK),
    ("overview_net.reduce", "high_level_proj"),
    ("focus_net.embed_features.conv", "patch_embedx.x_proj.0"),
    ("focus_net.embed_features.norm", "patch_embedx.x_proj.1"),
    ("focus_net.embed_context.conv", "patch_embedx.h_proj.0"),
    ("focus_net.embed_context.norm", "patch_embedx.h_proj.1"),
    *(
        (f"focus_net.stage{i}.blocks.{{i}}.{ours}", f"sub_blocks{i}.{{i}}.{theirs}")
        for i in (3, 4)
        for ours, theirs in _DYNAMIC_BLOCK
    ),
    ("head.hidden.proj.conv", "head.0"),
    ("head.hidden.proj.norm", "head.1"),
    ("head.fc", "head.4"),
    ("aux_head.norm", "aux_head.0"),
    ("aux_head.fc", "aux_head.2"),
]
_PYRAMID = [
    *((f"backbone.{ours}", theirs) for ours, theirs in _NETWORK),
    *((f"norms.{i}", f"extra_norm.{i}") for i in range(4)),
    ("overview_norm", "extra_norm.4"),
    ("overview_proj", "h_proj.0"),
    ("overview_scale", "h_proj.1"),
]
# Official modules whose tensors have another shape: (1, C, 1, 1) instead of (C,), (C, 1, 1, 1) instead of (C,), and
# 1x1 convolutions instead of linear layers.
_RESPONSE_NORM = re.compile(r"(.*\.)?(proj\.7|mlp\.3|fusion\.4)$")
_AFFINE_SCALE = re.compile(r"(.*\.)?(ls|ls1|ls2|x_scale|h_scale)$|h_proj\.1$")
_ONE_BY_ONE = re.compile(r"(.*\.)?(weight_proj|head\.4|aux_head\.2)$")
_LEAF = r"(\.(?:weight|bias|running_mean|running_var|num_batches_tracked))?$"


_TABLES = {"network": _NETWORK, "pyramid": _PYRAMID, "block": _CONTMIX_BLOCK}


@functools.cache  # at first use: five hundred patterns cost 37 ms, half of what this package adds to the import of timm
def _rules(kind: str) -> list[tuple[re.Pattern[str], str]]:
    compiled = []
    for ours, theirs in _TABLES[kind]:
        pattern = re.escape(ours).replace(r"\{i\}", r"(\d+)")
        compiled.append((re.compile(pattern + _LEAF), theirs))
    return compiled


def official_name(name: str, kind: str = "network") -> str:
    """The authors' name of one of our parameters or buffers.

    Args:
        name: in the state dict of a model of ours.
        kind: 'network' (OverLoCK), 'pyramid' (the dense backbone), or 'block' (ContMixBlock).

    Raises:
        KeyError: for a name that the model does not have.
    """
    for pattern, theirs in _rules(kind):
        match = pattern.match(name)
        if match:
            *numbers, leaf = match.groups()
            module = theirs.replace("{i}", "%s") % tuple(numbers)
            if _RESPONSE_NORM.match(module):
                leaf = {".weight": ".gamma", ".bias": ".beta"}[leaf]
            return module + (leaf or "")
    raise KeyError(f"no official name is known for {name!r}")


def to_official(state: Mapping[str, Tensor], kind: str = "network") -> dict[str, Tensor]:
    """Our state dict under the authors' names and in their shapes."""
    official = {}
    for name, tensor in state.items():
        theirs = official_name(name, kind)
        module, _, leaf = theirs.rpartition(".")
        official[theirs] = tensor
        if leaf in ("gamma", "beta"):
            official[theirs] = tensor.view(1, -1, 1, 1)
        elif leaf == "weight" and _AFFINE_SCALE.match(module):
            official[theirs] = tensor.view(-1, 1, 1, 1)
        elif leaf == "weight" and _ONE_BY_ONE.match(module):
            official[theirs] = tensor[:, :, None, None]
    return official


def kind_of(model: nn.Module) -> str:
    """Which table of names a model goes by."""
    if hasattr(model, "base_net"):
        return "network"
    return "pyramid" if hasattr(model, "backbone") else "block"


_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning or features_only


def unwrap(checkpoint: object) -> dict[str, Tensor]:
    """The state dict in a checkpoint: as it is, nested, averaged (preferred), or prefixed by a wrapper's name.

    Raises:
        ValueError: where there is none.
    """
    for key in ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model", "module"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"a checkpoint must hold a state dict, found {type(checkpoint).__name__}")
    state = {str(name): tensor for name, tensor in checkpoint.items() if isinstance(tensor, Tensor)}
    if not state:
        raise ValueError("the checkpoint holds no tensors")
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def translate(checkpoint: Mapping[str, object], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint in the names and shapes of a model of ours: timm's filter function for our models.

    Takes the authors' classification, merged, detection and segmentation files, and our own; nested, averaged or
    prefixed. What the model has no place for (auxiliary head, the head of a dense model) is left out; what the file may
    lack (a new classifier, new feature norms) is left to the model. Dense files fit a :class:`overlock.Pyramid` alone,
    since their feature norms are part of the network (see there).

    Raises:
        ValueError: naming the first names that are missing, left over, or of another shape.
    """
    state = unwrap(checkpoint)
    target = model.state_dict()
    if 2 * len(state.keys() & target.keys()) < len(target):  # not our names: at most a few are the same by chance
        backbone = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
        state = _from_official(backbone or state, model)
    return _fit(_merge_to_form(state, model), target)


def _from_official(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename by the table, over the names of the training form, which include those of the merged one."""
    kind = kind_of(model)
    names = {official_name(ours, kind): ours for ours in _training_form_names(model)}
    renamed = {}
    for theirs, tensor in state.items():
        module, _, leaf = theirs.rpartition(".")
        ours = names.get(theirs, theirs)
        renamed[ours] = tensor
        if leaf in ("gamma", "beta") or (leaf == "weight" and _AFFINE_SCALE.match(module)):
            renamed[ours] = tensor.flatten()
        elif leaf == "weight" and _ONE_BY_ONE.match(module):
            renamed[ours] = tensor.flatten(1)
    return renamed


def _training_form_names(model: nn.Module) -> list[str]:
    names = list(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, DilatedRepConv):
            prefix = f"{name}." if name else ""
            full = DilatedRepConv(1, module.large.kernel_size[0])
            names += [prefix + extra for extra in full.state_dict()] + [prefix + "large.bias"]
    return list(dict.fromkeys(names))


def _merge_to_form(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
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


_OPTIONAL = re.compile(r"(backbone\.)?(aux_head|head)\.|norms\.\d|overview_(norm|proj|scale)\.|extra_norm\.4|h_proj\.")
_CLASSIFIER = re.compile(r"(aux_head|head)\.fc\.(weight|bias)$")


def _fit(state: dict[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what the model has no place for and replace new classifiers; raise for any other difference."""
    fitted = {name: t for name, t in state.items() if name in target or not _OPTIONAL.match(name)}
    same_classes = all(fitted[n].shape == target[n].shape for n in fitted if n in target and _CLASSIFIER.match(n))
    if not same_classes:
        fitted = {name: t for name, t in fitted.items() if not _CLASSIFIER.match(name)}
    missing = [name for name in target if name not in fitted and not _OPTIONAL.match(name)]
    extra = [name for name in fitted if name not in target]
    other = [
        f"{name} {tuple(fitted[name].shape)} where the model has {tuple(target[name].shape)}"
        for name in fitted
        if name in target and fitted[name].shape != target[name].shape and not name.endswith("embed.0.conv.weight")
    ]
    if missing or extra or other:
        hint = ""
        if any(".branches." in name for name in missing) and any(name.endswith(".large.bias") for name in extra):
            hint = ". The file is in the merged form; build the model with deploy=True"
        elif any(name.startswith(("extra_norm.", "norms.")) for name in extra):
            hint = ". The file is that of a dense backbone; load it into overlock.Pyramid"
        raise ValueError(describe_misfits(missing, extra, other) + hint)
    return fitted


def describe_misfits(missing: list[str], left_over: list[str], other: list[str]) -> str:
    """A sentence with the first of each kind of names."""
    problems = [
        f"{len(names)} {what} (first: {', '.join(names[:3])})"
        for what, names in (("missing", missing), ("left over", left_over), ("of another shape", other))
        if names
    ]
    return f"the weights do not fit the model: {'; '.join(problems)}"


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, object]:
    """Read a checkpoint without running any code in it; see :mod:`overlock.unpickling`.

    Raises:
        ValueError: for a missing, damaged or foreign file, naming it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable checkpoint, or cut short ({error})") from None
    checkpoint = read_saved(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: a checkpoint must hold a state dict, found {type(checkpoint).__name__}")
    return checkpoint


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint file, the authors', timm's or ours, into a model of ours.

    A new number of classes gets a new classifier, and other channels than colours a first convolution made of the
    given one, as with timm.

    Raises:
        ValueError: for an unreadable file, or one that does not fit; then the model is as it was.
    """
    load_translated(model, path, translate)


def load_translated(
    model: nn.Module,
    path: str | os.PathLike[str],
    translator: Callable[[Mapping[str, object], nn.Module], dict[str, Tensor]],
) -> None:
    """Load a checkpoint file by way of a function from it and the model to the model's names and shapes.

    Raises:
        ValueError: for an unreadable file, or one that does not fit; then the model is as it was.
    """
    try:
        state = adapt_channels(translator(read_checkpoint(path), model), model)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None
    model.load_state_dict(state, strict=False)


def adapt_channels(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit the first convolution of weights for colours to a model of other channels, as timm does.

    Raises:
        ValueError: for weights of other channels than colours.
    """
    target = model.state_dict()
    for name in [name for name in state if name.endswith("embed.0.conv.weight") and name in target]:
        given, wanted = state[name].shape[1], target[name].shape[1]
        if given == wanted:
            continue
        if given != 3:
            raise ValueError(f"the weights are for images of {given} channels, the model for {wanted}; build it alike")
        state = {**state, name: adapt_input_conv(wanted, state[name])}
    return state
