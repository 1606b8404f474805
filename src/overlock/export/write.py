"""A traced network as a file of each format, its spec inside."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from overlock.export.detectors import OUTPUTS
from overlock.export.spec import KEY, Spec
from overlock.files import unwritable

Program = torch.export.ExportedProgram
OPSET = 20
"""Of ONNX: the first with GELU."""
EXTRA_FILE = f"{KEY}.json"
"""The spec in an archive of torch.export."""
SPEC_METHOD = f"{KEY}_spec"
"""Of ExecuTorch's programs, which gives the spec."""


def write_onnx(program: Program, spec: Spec, path: Path) -> None:
    needs("onnxscript", "onnx")
    free = "size" in spec.dynamic
    model: Any = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["images"], output_names=output_names(program, spec),
        opset_version=OPSET, optimize=not free,
    )  # fmt: skip
    if free:
        simplify(model.model)
    model.model.metadata_props[KEY] = spec.to_json()
    model.save(path, external_data=False)


def simplify(model: Any) -> None:
    """Fold the constants of onnxscript's model and take out what is there twice or for nothing.

    Its own optimizer also looks for patterns to rewrite. In the large graphs of a free size that takes a third of
    the time of an export, and most patterns are of known shapes.
    """
    from onnx_ir.passes import common  # noqa: PLC0415
    from onnxscript import optimizer  # noqa: PLC0415

    optimizer.inline(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    for step in (
        common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(), common.CommonSubexpressionEliminationPass(), common.NameFixPass(),
    ):  # fmt: skip
        step(model)


def write_openvino(program: Program, spec: Spec, path: Path) -> None:
    needs("openvino")
    import openvino  # noqa: PLC0415

    if spec.task == "detect":  # whose numbers of boxes only its converter of ONNX follows
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "detector.onnx"
            write_onnx(program, spec, source)
            model = openvino.convert_model(source)
    else:
        model = openvino.convert_model(program)
    model.inputs[0].set_names({"images"})
    for output, name in zip(model.outputs, output_names(program, spec), strict=True):
        output.set_names({name})
    model.set_rt_info(spec.to_json(), KEY)
    openvino.save_model(model, path, compress_to_fp16=spec.precision == "fp16")


def write_torch_export(program: Program, spec: Spec, path: Path) -> None:
    torch.export.save(program, path, extra_files={EXTRA_FILE: spec.to_json()})


def write_aoti(program: Program, spec: Spec, path: Path) -> None:
    settings = {"aot_inductor.metadata": {KEY: spec.to_json()}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)


def write_executorch(program: Program, spec: Spec, path: Path) -> None:
    needs("executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # noqa: PLC0415
    from executorch.exir import to_edge_transform_and_lower  # noqa: PLC0415

    edge = to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], constant_methods={SPEC_METHOD: spec.to_json()}
    )
    path.write_bytes(edge.to_executorch().buffer)


WRITERS: dict[str, Callable[[Program, Spec, Path], None]] = {
    "onnx": write_onnx, "openvino": write_openvino, "torch-export": write_torch_export, "aoti": write_aoti,
    "executorch": write_executorch,
}  # fmt: skip


def write(program: Program, spec: Spec, path: Path) -> None:
    """Write a traced network in its format. OpenVINO's weights are a second file, which ends in .bin.

    Raises:
        ImportError: without the package of the format.
    """
    with quietly(), uncached(spec):
        WRITERS[spec.format](program, spec, path)


class Writing:
    """A place for a file that is moved to its own, whole, at the end of a ``with`` block that raises nothing.

    What else lies in that place is moved with it.

    Raises:
        ValueError: where the file cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Path:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.folder = tempfile.TemporaryDirectory(prefix=f".{self.path.name}.", dir=self.path.parent)
        except OSError as error:
            raise unwritable(self.path, error) from None
        return Path(self.folder.name) / self.path.name

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for part in sorted(Path(self.folder.name).iterdir()):  # .bin before .xml
                part.replace(self.path.with_name(part.name))
        self.folder.cleanup()


def output_names(program: Program, spec: Spec) -> list[str]:
    """Of a detector what they are; else 'output' for one, and for several numbered from the front."""
    count = len(program.graph_signature.user_outputs)
    if spec.task == "detect":
        return list(OUTPUTS[:count])
    return ["output"] if count == 1 else [f"output{i}" for i in range(count)]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, the converters' notes to programmers are left out."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def uncached(spec: Spec) -> contextlib.AbstractContextManager[object]:
    """Inside, PyTorch does not remember the shapes that operations give, if sizes are free.

    Then hardly two calls are alike, and keeping and comparing them takes a third of the time of a trace.
    """
    return torch._dynamo.config.patch(fake_tensor_cache_enabled="size" not in spec.dynamic)


def needs(*packages: str) -> None:
    """Raise ImportError, with what to install, where a package is absent."""
    import importlib.util  # noqa: PLC0415

    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"this needs {package}: pip install 'overlock[export]'")
