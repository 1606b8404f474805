"""Trained networks as files for other runtimes: ONNX, OpenVINO, torch.export, AOTInductor and ExecuTorch."""

from typing import TYPE_CHECKING

from overlock import lazy

if TYPE_CHECKING:
    from overlock.export.export import Report, export_network
    from overlock.export.runtimes import ExportedNetwork
    from overlock.export.spec import Spec
else:
    __getattr__, __dir__ = lazy.attach(
        __name__,
        {"export": ["Report", "export_network"], "runtimes": ["ExportedNetwork"], "spec": ["Spec"]},
    )

__all__ = ["ExportedNetwork", "Report", "Spec", "export_network"]
