"""The extras that messages name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from overlock.extras import needing

ROOT = Path(__file__).resolve().parents[1]


def test_message():
    told = pytest.raises(ImportError, match=r"^videos need PyAV: pip install 'overlock\[video\]'$")
    with told, needing("videos need PyAV", "video"):
        import overlock.no_such_module  # noqa: F401


def test_extras_are_there():
    """Each one that is named in the sources is one of pyproject.toml's."""
    known = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    calls = r'(?:needing|missing_extra)\([^\n]*, "(\w+)"\)'
    named = {
        name for path in (ROOT / "src").rglob("*.py") for name in re.findall(calls, path.read_text(encoding="utf-8"))
    }
    assert {"detect", "segment", "embed", "video", "train"} <= named
    assert named <= set(re.findall(r"^(\w+) = \[", known, flags=re.MULTILINE))
