"""How long files and functions of the package may be. (How many parameters: ruff.)"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "overlock"
FILES = sorted(PACKAGE.rglob("*.py"))
COMPILED = PACKAGE / "kernels"
"""A kernel is one function, since its parts would take registers to call."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_length(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert COMPILED in file.parents or not {name: lines for name, lines in lengths.items() if lines > 60}
