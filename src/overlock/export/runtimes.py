"""Exported files opened again, each by its own runtime, as modules that predictors take."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overlock.export.spec import KEY, Spec, format_of
from overlock.export.write import EXTRA_FILE, SPEC_METHOD, needs, quietly

Outputs = Sequence[Tensor]
Call = Callable[[Tensor], Outputs]


def open_onnx(path: Path, threads: int) -> tuple[str, Call]:
    needs("onnxruntime")
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(images: Tensor) -> Outputs:
        return [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]

    return session.get_modelmeta().custom_metadata_map[KEY], call


def open_openvino(path: Path, threads: int) -> tuple[str, Call]:
    needs("openvino")
    import openvino  # noqa: PLC0415

    core = openvino.Core()
    model = core.read_model(path)
    text = model.get_rt_info(KEY).astype(str)
    hint = "bf16" if Spec.from_json(text).precision in ("bf16", "int8") else "f32"
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint}
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def call(images: Tensor) -> Outputs:
        found = request.infer([images.numpy()])
        return [torch.from_numpy(found[i].copy()) for i in range(len(found))]

    return text, call


def open_torch_export(path: Path, _threads: int) -> tuple[str, Call]:
    extra = {EXTRA_FILE: ""}
    module = torch.export.load(path, extra_files=extra).module()

    def call(images: Tensor) -> Outputs:  # a function, since as a submodule it would refuse eval()
        return module(images)

    return str(extra[EXTRA_FILE]), call


def open_aoti(path: Path, _threads: int) -> tuple[str, Call]:
    loaded: Any = torch._inductor.aoti_load_package(str(path))
    return loaded.loader.get_metadata()[KEY], loaded


def open_executorch(path: Path, _threads: int) -> tuple[str, Call]:
    needs("executorch")
    from executorch.runtime import Runtime  # noqa: PLC0415

    program = Runtime.get().load_program(path)
    method: Any = program.load_method("forward")
    text: Any = program.load_method(SPEC_METHOD)
    return text.execute([])[0], lambda images: method.execute([images])


OPENERS: dict[str, Callable[[Path, int], tuple[str, Call]]] = {
    "onnx": open_onnx, "openvino": open_openvino, "torch-export": open_torch_export, "aoti": open_aoti,
    "executorch": open_executorch,
}  # fmt: skip


class ExportedNetwork(nn.Module):
    """An exported file, called as the network that it was made of: images (B, C, H, W) to its task's output.

    Where the file takes one image at a time, a batch is taken apart.

    Args:
        path: of the file.
        threads: of ONNX Runtime and OpenVINO; those of PyTorch unless given.

    Raises:
        ValueError: for a missing, damaged or foreign file; at a call, for images that the file does not take.
        ImportError: without the package of the runtime.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None):
        super().__init__()
        self.path = path = Path(path)
        kind = format_of(path)
        if kind is None or not path.is_file():
            raise ValueError(f"{path}: no such exported file; overlock export writes them")
        try:
            with quietly():
                text, self._run = OPENERS[kind](path, threads or torch.get_num_threads())
                self.spec = Spec.from_json(text)
        except ImportError:
            raise
        except Exception as error:  # noqa: BLE001 - of runtimes, each of which has its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path}: not a file of overlock export, or damaged ({reason})") from None
        self.eval()

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        outputs = self.run(images)
        return list(outputs) if len(outputs) > 1 else outputs[0]

    def run(self, images: Tensor) -> Outputs:
        """All outputs."""
        self.spec.check_images(images.shape)
        images = images.detach().cpu().contiguous()
        with torch.no_grad():
            if "batch" in self.spec.dynamic:
                return self._run(images)
            each = [[output.clone() for output in self._run(image)] for image in images.split(1)]
        return [torch.cat(parts) for parts in zip(*each, strict=True)]
