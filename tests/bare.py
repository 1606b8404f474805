"""A Python that has PyTorch, Triton, timm, NumPy and pytest, and of all else that the package can use nothing.

That is what a machine with a GPU may have. What timm itself needs is there: torchvision, Pillow, PyYAML, safetensors
and huggingface_hub; and wrapt.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MISSING = (
    "av", "datasets", "hypothesis", "jsonargparse", "lightning", "llvmlite", "matplotlib", "numba", "onnx",
    "onnxruntime", "onnxscript", "pyarrow", "pycocotools", "rich", "segmentation_models_pytorch", "sklearn",
    "supervision", "tensorboard", "torchmetrics", "transformers", "webdataset",
)  # fmt: skip
BLOCKER = f"""
from importlib.machinery import PathFinder

found = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *others: None if name.partition(".")[0] in {MISSING!r} else found(name, *others)
)
"""


def run_bare(folder: Path, *words: str | Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run Python with some arguments from the repository's root, a folder being given for a file of ours."""
    (folder / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join([str(folder), str(ROOT / "src")])
    environment = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
