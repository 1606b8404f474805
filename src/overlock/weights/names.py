"""Names of the network's tensors, ours and the authors', both ways, and the shapes that differ."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

RELEASE = "https://github.com/LMMMEng/OverLoCK/releases/download/v1/"
"""Where the authors' files of weights are downloaded from."""
LEAVES = r"(\.(?:weight|bias|running_mean|running_var|num_batches_tracked|gamma|beta))?"


class NameTable:
    """Pairs of module names, ours first; ``{i}`` is a number, the same in both, and what is below a module follows it.

    Args:
        pairs: ours and theirs.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]):
        self.pairs = pairs

    # At first use: five hundred patterns cost 37 ms, half of what this package adds to the import of timm.
    @functools.cached_property
    def _to_ours(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(theirs), ours) for ours, theirs in self.pairs]

    @functools.cached_property
    def _to_theirs(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(ours), theirs) for ours, theirs in self.pairs]

    def ours(self, name: str) -> str | None:
        """Our name of one of theirs, None where the table has none."""
        return _rename(name, self._to_ours)

    def theirs(self, name: str) -> str | None:
        """Their name of one of ours, None where the table has none."""
        return _rename(name, self._to_theirs)


def _pattern(module: str) -> re.Pattern[str]:
    return re.compile(re.escape(module).replace(r"\{i\}", r"(\d+)") + LEAVES)


def _rename(name: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, other in rules:
        match = pattern.fullmatch(name)
        if match:
            *numbers, leaf = match.groups()
            return other.replace("{i}", "%s") % tuple(numbers) + (leaf or "")
    return None


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
_GREEK = {"weight": "gamma", "bias": "beta"}
_LATIN = {greek: latin for latin, greek in _GREEK.items()}

_TABLES = {
    "network": NameTable(_NETWORK),
    "pyramid": NameTable(_PYRAMID),
    "block": NameTable(_CONTMIX_BLOCK),
}


def official_name(name: str, kind: str = "network") -> str:
    """The authors' name of one of our parameters or buffers.

    Args:
        name: in the state dict of a model of ours.
        kind: 'network' (OverLoCK), 'pyramid' (the dense backbone), or 'block' (ContMixBlock).

    Raises:
        KeyError: for a name that the model does not have.
    """
    theirs = _TABLES[kind].theirs(name)
    if theirs is None:
        raise KeyError(f"no official name is known for {name!r}")
    module, _, leaf = theirs.rpartition(".")
    return f"{module}.{_GREEK[leaf]}" if _RESPONSE_NORM.match(module) else theirs


def to_official(state: Mapping[str, Tensor], kind: str = "network") -> dict[str, Tensor]:
    """Our state dict under the authors' names and in their shapes."""
    official = {}
    for name, tensor in state.items():
        theirs = official_name(name, kind)
        module, _, leaf = theirs.rpartition(".")
        official[theirs] = tensor
        if leaf in _LATIN:
            official[theirs] = tensor.view(1, -1, 1, 1)
        elif leaf == "weight" and _AFFINE_SCALE.match(module):
            official[theirs] = tensor.view(-1, 1, 1, 1)
        elif leaf == "weight" and _ONE_BY_ONE.match(module):
            official[theirs] = tensor[:, :, None, None]
    return official


def from_official(state: Mapping[str, Tensor], kind: str = "network") -> dict[str, Tensor]:
    """The authors' state dict under our names and in our shapes; names that are not theirs stay."""
    renamed = {}
    for theirs, tensor in state.items():
        ours = _TABLES[kind].ours(theirs)
        if ours is None:
            renamed[theirs] = tensor
            continue
        module, _, leaf = theirs.rpartition(".")
        if leaf in _LATIN:
            renamed[f"{ours.rpartition('.')[0]}.{_LATIN[leaf]}"] = tensor.flatten()
        elif leaf == "weight" and _AFFINE_SCALE.match(module):
            renamed[ours] = tensor.flatten()
        else:
            renamed[ours] = tensor.flatten(1) if leaf == "weight" and _ONE_BY_ONE.match(module) else tensor
    return renamed
