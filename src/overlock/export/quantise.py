"""int8 by static calibration: NNCF for OpenVINO, ONNX Runtime's own tools for ONNX.

Which parts stay in float is measured: a group of operations does where keeping it brings the outputs clearly nearer to
those of the float file. What is measured on is not what is calibrated on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overlock.export.runtimes import ExportedNetwork
from overlock.export.spec import KEY, Spec
from overlock.export.write import needs, quietly

Groups = dict[str, list[str]]
"""Names of operations that are kept in float together."""

WORTHWHILE = 0.75
"""A group is kept in float where the difference from the float file falls below this share of what it was."""
MEASURED = 4
"""Images that groups are measured on; the others are calibrated on."""
PRODUCTS = ("Convolution", "GroupConvolution", "MatMul", "Conv", "Gemm")
MOVES = ("Transpose", "Reshape", "Gather", "Concat", "Squeeze", "Unsqueeze", "Slice", "StridedSlice", "VariadicSplit")
"""OpenVINO's operations that move numbers and do not change them."""


def quantise(source: Path, target: Path, spec: Spec, images: Sequence[Tensor]) -> list[str]:
    """Write a float file as one of int8.

    Args:
        source: a file of fp32.
        target: to write.
        spec: of the int8 file.
        images: (1, C, H, W) each, as the file takes them; at least one more than MEASURED.

    Returns:
        The groups of operations that were kept in float.

    Raises:
        ValueError: for too few images.
        ImportError: without the package that quantises.
    """
    if len(images) <= MEASURED:
        raise ValueError(f"int8 needs more than {MEASURED} images to calibrate on, got {len(images)}; give --images")
    write, groups_of = dict(openvino=(_by_nncf, _openvino_groups), onnx=(_by_onnxruntime, _onnx_groups))[spec.format]
    measured, calibration = images[:MEASURED], images[MEASURED:]
    wanted = _outputs(source, measured)

    def make(kept: Sequence[str]) -> None:
        with quietly():
            write(source, target, spec, calibration, kept)

    def difference(kept: Sequence[str]) -> float:
        make(kept)
        return float((_outputs(target, measured) - wanted).norm() / wanted.norm())

    groups = groups_of(source)
    everything, last = difference([]), list[str]()
    kept: list[str] = []
    for name, operations in groups.items():
        last = operations
        if difference(operations) < WORTHWHILE * everything:
            kept.append(name)
    best = [operation for name in kept for operation in groups[name]]
    if best != last:
        make(best)
    return kept


def _outputs(path: Path, images: Sequence[Tensor]) -> Tensor:
    """All numbers that a file gives for some images."""
    exported = ExportedNetwork(path)
    return torch.cat([output.float().flatten() for image in images for output in exported.run(image)])


def _by_nncf(source: Path, target: Path, spec: Spec, images: Sequence[Tensor], kept: Sequence[str]) -> None:
    needs("openvino", "nncf")
    import nncf  # noqa: PLC0415
    import openvino  # noqa: PLC0415

    model = openvino.Core().read_model(source)
    quantised: Any = nncf.quantize(
        model, nncf.Dataset([image.numpy() for image in images]), subset_size=len(images),
        preset=nncf.QuantizationPreset.MIXED, ignored_scope=nncf.IgnoredScope(names=list(kept)),
    )  # fmt: skip
    quantised.set_rt_info(spec.to_json(), KEY)
    openvino.save_model(quantised, target, compress_to_fp16=False)


def _openvino_groups(path: Path) -> Groups:
    """The products of ContMix, those of two computed matrices; sums and scales; the last layer."""
    import openvino  # noqa: PLC0415

    operations = openvino.Core().read_model(path).get_ordered_ops()
    products = [op for op in operations if op.get_type_name() in PRODUCTS]
    return _groups(
        mixing=[op.get_friendly_name() for op in products if _is_computed(op)],
        scales=[op.get_friendly_name() for op in operations if op.get_type_name() in ("Add", "Multiply")],
        last=[op.get_friendly_name() for op in products[-1:]],
    )


def _is_computed(operation: Any) -> bool:
    """Whether no input of a matrix product is a weight."""
    inputs = [operation.input_value(i).get_node() for i in range(2)]
    return operation.get_type_name() == "MatMul" and not any(one.get_type_name() == "Constant" for one in inputs)


def _by_onnxruntime(source: Path, target: Path, spec: Spec, images: Sequence[Tensor], kept: Sequence[str]) -> None:
    needs("onnx", "onnxruntime")
    import onnx  # noqa: PLC0415
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static  # noqa: PLC0415

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest: Iterator[Tensor] = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.rest, None)
            return None if image is None else {"images": image.numpy()}

    quantize_static(
        source, target, Reader(), op_types_to_quantize=["Conv", "MatMul", "Gemm"], per_channel=True,
        reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        nodes_to_exclude=list(kept),
    )  # fmt: skip
    model = onnx.load(target)
    onnx.helper.set_model_props(model, {KEY: spec.to_json()})
    onnx.save(model, target)


def _onnx_groups(path: Path) -> Groups:
    import onnx  # noqa: PLC0415

    graph = onnx.load(path, load_external_data=False).graph
    weights = {one.name for one in graph.initializer}
    products = [node for node in graph.node if node.op_type in PRODUCTS]
    computed = [node.name for node in products if node.op_type == "MatMul" and not weights & set(node.input)]
    return _groups(mixing=computed, last=[node.name for node in products[-1:]])


def _groups(**names: list[str]) -> Groups:
    return {group: own for group, own in names.items() if own}


def int8_share(path: Path, spec: Spec) -> float:
    """The share of a file's multiply-adds whose inputs are int8."""
    counts = {"openvino": _openvino_products, "onnx": _onnx_products}[spec.format](path, spec)
    total = [macs for macs, _ in counts]
    return sum(macs for macs, is_int8 in counts if is_int8) / max(1, sum(total))


def _openvino_products(path: Path, spec: Spec) -> list[tuple[int, bool]]:
    """Multiply-adds of each product, and whether it is one of int8."""
    import openvino  # noqa: PLC0415

    model = openvino.Core().read_model(path)
    model.reshape([1, spec.record.channels, *spec.image_size])
    found = []
    for operation in model.get_ordered_ops():
        kind = operation.get_type_name()
        if kind not in PRODUCTS:
            continue
        sides = list(operation.input_value(0 if kind == "MatMul" else 1).get_shape())
        if kind == "MatMul":
            inner = sides[-2] if operation.get_attributes()["transpose_a"] else sides[-1]
        else:
            inner = _product(sides[2 if kind == "GroupConvolution" else 1 :])
        given = operation.input_value(0).get_node()
        while given.get_type_name() in MOVES:
            given = given.input_value(0).get_node()
        found.append((inner * _product(operation.output(0).get_shape()), given.get_type_name() == "FakeQuantize"))
    return found


def _onnx_products(path: Path, spec: Spec) -> list[tuple[int, bool]]:
    import onnx  # noqa: PLC0415

    model = onnx.load(path)
    for axis, side in zip(
        model.graph.input[0].type.tensor_type.shape.dim, (1, spec.record.channels, *spec.image_size), strict=True
    ):
        axis.dim_value = side
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, list[int]] = {one.name: list(one.dims) for one in graph.initializer}
    for one in (*graph.value_info, *graph.output, *graph.input):
        shapes.setdefault(one.name, [axis.dim_value for axis in one.type.tensor_type.shape.dim])
    made_by = {name: node for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type in PRODUCTS:
            sides = shapes[node.input[0] if node.op_type != "Conv" else node.input[1]]
            inner = sides[-1] if node.op_type != "Conv" else _product(sides[1:])
            maker = made_by.get(node.input[0])
            found.append(
                (inner * _product(shapes[node.output[0]]), maker is not None and maker.op_type.startswith("Deq"))
            )
    return found


def _product(sides: Sequence[int]) -> int:
    result = 1
    for side in sides:
        result *= max(1, side)
    return result
