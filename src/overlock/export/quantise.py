"""int8 by static calibration: NNCF for OpenVINO, ONNX Runtime's own tools for ONNX.

In int8 are the products that gain by it: convolutions of all channels and linear layers. Depthwise convolutions, the
products of ContMix and what lies between take longer in int8 with its conversions than without. Whether the first and
the last product stay in float too is measured: they do where that brings the outputs clearly nearer to those of the
float file. What is measured on is not what is calibrated on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overlock.export.runtimes import ExportedNetwork
from overlock.export.spec import KEY, Spec
from overlock.export.write import needs, quietly

WORTHWHILE = 0.75
"""A product is kept in float where the difference from the float file falls below this share of what it was."""
MEASURED = 4
"""Images that this is measured on; the others are calibrated on."""
LEAST = 0.001
"""The share of all multiply-adds from which on a product gains by int8; those of squeeze-excite have less."""
PRODUCTS = ("Convolution", "GroupConvolution", "MatMul", "Conv", "Gemm")
MOVES = ("Transpose", "Reshape", "Gather", "Concat", "Squeeze", "Unsqueeze", "Slice", "StridedSlice", "VariadicSplit")
"""OpenVINO's operations that move numbers and do not change them."""


class Product(NamedTuple):
    """A convolution or a product of matrices in a file."""

    name: str
    macs: int
    is_int8: bool
    is_dense: bool
    """Whether it is one of all channels with weights: neither depthwise nor of computed matrices."""


def quantise(source: Path, target: Path, spec: Spec, images: Sequence[Tensor]) -> list[str]:
    """Write a float file as one of int8.

    Args:
        source: a file of fp32.
        target: to write.
        spec: of the int8 file.
        images: (1, C, H, W) each, as the file takes them; at least one more than MEASURED.

    Returns:
        Which of the products that could be int8 were kept in float: "first", "last" or both.

    Raises:
        ValueError: for too few images.
        ImportError: without the package that quantises.
    """
    if len(images) <= MEASURED:
        raise ValueError(f"int8 needs more than {MEASURED} images to calibrate on, got {len(images)}; give --images")
    write = dict(openvino=_by_nncf, onnx=_by_onnxruntime)[spec.format]
    measured, calibration = images[:MEASURED], images[MEASURED:]
    wanted = _outputs(source, measured)
    products = find_products(source, spec)
    least = LEAST * sum(product.macs for product in products)
    dense = [product.name for product in products if product.is_dense and product.macs >= least]

    def make(kept: Collection[str]) -> None:
        with quietly():
            write(source, target, spec, calibration, [name for name in dense if name not in kept])

    def difference(kept: Collection[str]) -> float:
        make(kept)
        return float((_outputs(target, measured) - wanted).norm() / wanted.norm())

    ends = dict(first=dense[0], last=dense[-1]) if len(dense) > 2 else {}  # something is to be in int8
    everything, last = difference([]), list[str]()
    kept = []
    for end, name in ends.items():
        last = [name]
        if difference(last) < WORTHWHILE * everything:
            kept.append(end)
    best = [ends[end] for end in kept]
    if best != last:
        make(best)
    return kept


def _outputs(path: Path, images: Sequence[Tensor]) -> Tensor:
    """All numbers that a file gives for some images."""
    exported = ExportedNetwork(path)
    return torch.cat([output.float().flatten() for image in images for output in exported.run(image)])


def _by_nncf(source: Path, target: Path, spec: Spec, images: Sequence[Tensor], in_int8: Collection[str]) -> None:
    needs("openvino", "nncf")
    import nncf  # noqa: PLC0415
    import openvino  # noqa: PLC0415

    model = openvino.Core().read_model(source)
    operations = model.get_ordered_ops()
    products = [op.get_friendly_name() for op in operations if op.get_type_name() in PRODUCTS]
    others = {op.get_type_name() for op in operations}.difference(PRODUCTS, ("Constant", "Parameter", "Result"))
    ignored = nncf.IgnoredScope(names=[name for name in products if name not in in_int8], types=sorted(others))
    quantised: Any = nncf.quantize(
        model, nncf.Dataset([image.numpy() for image in images]), subset_size=len(images),
        preset=nncf.QuantizationPreset.MIXED, ignored_scope=ignored,
    )  # fmt: skip
    quantised.set_rt_info(spec.to_json(), KEY)
    openvino.save_model(quantised, target, compress_to_fp16=False)


def _by_onnxruntime(source: Path, target: Path, spec: Spec, images: Sequence[Tensor], in_int8: Collection[str]) -> None:
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
        source, target, Reader(), op_types_to_quantize=["Conv", "MatMul", "Gemm"], nodes_to_quantize=list(in_int8),
        per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    model = onnx.load(target)
    onnx.helper.set_model_props(model, {KEY: spec.to_json()})
    onnx.save(model, target)


def int8_share(path: Path, spec: Spec) -> float:
    """The share of a file's multiply-adds whose inputs are int8."""
    products = find_products(path, spec)
    return sum(one.macs for one in products if one.is_int8) / max(1, sum(one.macs for one in products))


def find_products(path: Path, spec: Spec) -> list[Product]:
    """In the order of the file; multiply-adds are those of an image of the spec's size."""
    return {"openvino": _openvino_products, "onnx": _onnx_products}[spec.format](path, spec)


def _openvino_products(path: Path, spec: Spec) -> list[Product]:
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
            inner = math.prod(sides[2 if kind == "GroupConvolution" else 1 :])
        given, weight = (operation.input_value(i).get_node() for i in range(2))
        while given.get_type_name() in MOVES:
            given = given.input_value(0).get_node()
        is_matrix = weight.get_type_name() == "Constant" and len(operation.input_value(1).get_shape()) == 2
        found.append(
            Product(
                name=operation.get_friendly_name(),
                macs=inner * math.prod(operation.output(0).get_shape()),
                is_int8=given.get_type_name() == "FakeQuantize",
                is_dense=is_matrix if kind == "MatMul" else kind == "Convolution",
            )
        )
    return found


def _onnx_products(path: Path, spec: Spec) -> list[Product]:
    import onnx  # noqa: PLC0415

    model = onnx.load(path)
    for axis, side in zip(
        model.graph.input[0].type.tensor_type.shape.dim, (1, spec.record.channels, *spec.image_size), strict=True
    ):
        axis.dim_value = side
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    weights = {one.name: list(one.dims) for one in graph.initializer}
    shapes = dict(weights)
    for one in (*graph.value_info, *graph.output, *graph.input):
        shapes.setdefault(one.name, [axis.dim_value for axis in one.type.tensor_type.shape.dim])
    made_by = {name: node for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        sides, is_conv = shapes[node.input[1]], node.op_type == "Conv"
        inner = sides[1:] if is_conv else shapes[node.input[0]][-1:]
        groups = next((one.i for one in node.attribute if one.name == "group"), 1)
        maker = made_by.get(node.input[0])
        found.append(
            Product(
                name=node.name,
                macs=math.prod(max(1, side) for side in (*inner, *shapes[node.output[0]])),
                is_int8=maker is not None and maker.op_type.startswith("Dequantize"),
                is_dense=groups == 1 if is_conv else len(weights.get(node.input[1], ())) == 2,
            )
        )
    return found
