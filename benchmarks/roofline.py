"""What each kind of operation in a network computes and moves, and the least time that a GPU needs for it.

    python benchmarks/roofline.py                                            # OverLoCK-T, batch 128 at 224 x 224
    python benchmarks/roofline.py --size '[800,1280]' --batch 1 --csv FILE

It runs on shapes alone, in a second. The network is the folded one in bfloat16, an operation at a time: each reads its
inputs from memory and writes its result there. Views are free. A fused network moves less: what several operations
share stays in registers. The rates are an H100's, rounded down; ``--bandwidth`` and the others take another card's.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import timm
import torch
from jsonargparse import auto_cli
from timing import say, write_csv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import overlock  # noqa: F401 - registers the models
from overlock.analysis.cost import count_applications, count_generation

aten = torch.ops.aten
BYTES = 2
VIEWS = {"view", "permute", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "split", "detach",
         "split_with_sizes", "unbind", "alias", "_unsafe_view", "as_strided", "chunk", "unflatten"}  # fmt: skip
TENSOR_CORES, UNITS = "tensor cores", "ordinary units"


class Roofline(TorchDispatchMode):
    """Counts operations by kind: calls, FLOPs, bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if name not in VIEWS and "empty" not in name:
            moved = [x for x in torch.utils._pytree.tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
            row = self.kinds[_kind(name, args)]
            row[0] += 1
            row[1] += _flops(function, name, args, result)
            row[2] += BYTES * sum(x.numel() for x in moved)
        return result


def _kind(name: str, args: Any) -> str:
    if name == "convolution":
        weight, groups = args[1], args[8]
        size = weight.shape[-1]
        if groups > 1:
            return f"depthwise convolution, K {size}" if size > 3 else "depthwise convolution, 3 x 3"
        return "1 x 1 convolution" if size == 1 else "dense convolution, 3 x 3"
    if name in {"addmm", "mm", "bmm", "linear"}:
        return "linear layer"
    if name == "contmix":
        return f"ContMix, K {args[6]}"
    return "norms, activations, sums, scales, copies"


def _flops(function: Any, name: str, args: Any, result: Any) -> int:
    if name == "contmix":
        shapes = [x.shape if isinstance(x, torch.Tensor) else x for x in args]
        return count_generation(*shapes) + count_applications(*shapes)
    formula = flop_registry.get(function.overloadpacket)
    return int(formula(*args, out_val=result)) if formula else result.numel() if isinstance(result, torch.Tensor) else 0


def main(
    model: str = "overlock_t",
    batch: int = 128,
    size: tuple[int, int] = (224, 224),
    bandwidth: float = 3.0,
    tensor_cores: float = 700.0,
    units: float = 60.0,
    csv: str | None = None,
) -> None:
    """Count, and print a table.

    Args:
        model: a timm name.
        batch: images.
        size: their height and width.
        bandwidth: of the memory, TB/s.
        tensor_cores: bfloat16 products on tensor cores, TFLOP/s.
        units: float32 on the ordinary units, TFLOP/s.
        csv: file for the table.
    """
    with torch.device("meta"):
        network = timm.create_model(model, **({"deploy": True} if model.startswith("overlock") else {})).eval()
        images = torch.empty(batch, 3, *size)
    with torch.no_grad(), Roofline() as found:
        network(images)
    rows = []
    for kind, (calls, flops, moved) in sorted(found.kinds.items(), key=lambda item: -item[1][2]):
        is_plain = kind.startswith(("norms", "depthwise convolution, 3"))
        rows.append({
            "operation": kind, "calls": calls, "GFLOP": flops / 1e9, "GB": moved / 1e9,
            "us, memory": moved / bandwidth / 1e6, f"us, {UNITS}": flops / units / 1e6,
            f"us, {TENSOR_CORES}": None if is_plain else flops / tensor_cores / 1e6,
        })  # fmt: skip
    header = list(rows[0])
    say(f"{model}, batch {batch}, {size[0]} x {size[1]}, bfloat16, {bandwidth:g} TB/s")
    say("| " + " | ".join(header) + " |")
    say("| " + " | ".join("---" for _ in header) + " |")
    for row in rows:
        texts = (x if isinstance(x, str) else "" if x is None else f"{x:,.4g}" for x in row.values())
        say("| " + " | ".join(texts) + " |")
    if csv:
        write_csv(rows, csv)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
