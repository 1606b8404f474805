"""The notebooks in examples run from top to bottom."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
NEEDS = {"look_inside.ipynb": ("pytorch_grad_cam",), "export_and_serve.ipynb": ("onnxruntime",)}


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_runs(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for module in NEEDS.get(notebook.name, ()):
        pytest.importorskip(module)
    shutil.copytree(EXAMPLES / "photos", tmp_path / "photos")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    book = nbformat.read(notebook, as_version=4)
    client = nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()  # raises where a cell does
    assert any(cell.get("outputs") for cell in book.cells)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_is_kept_without_outputs(notebook):
    """They would change with each run, and are large."""
    text = notebook.read_text()
    assert '"outputs": []' in text
    assert "image/png" not in text
