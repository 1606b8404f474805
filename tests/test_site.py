"""The documentation as a site: it builds without a warning, lacks nothing public, and loads nothing from elsewhere."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import pytest

import overlock
from overlock.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
FORMER = {"checkpoint", "fusion", "hub"}
"""Modules that have moved; their names are those of other modules here."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("material", reason="the site is built by mkdocs-material: pip install overlock[docs]")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "OVERLOCK_URL": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def public_modules() -> list[str]:
    names = [module.name for module in pkgutil.iter_modules(overlock.__path__) if module.name not in FORMER]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        modules = [overlock, *(importlib.import_module(f"overlock.{name}") for name in names)]
    return [module.__name__ for module in modules if getattr(module, "__all__", None)]


def test_public_names_are_in_the_reference(site):
    """By the inventory that the site gives to others' documentation."""
    *_, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    known = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    lost = []
    for module in public_modules():
        for name in importlib.import_module(module).__all__:
            home = f"{module}.{name}.{name}"  # a function that a module of the same name hides
            if not {f"{module}.{name}", home} & known:
                lost.append(f"{module}.{name}")
    assert not lost
    page = (site / "reference" / "index.html").read_text()
    assert not [module for module in public_modules() if f'id="{module}.' not in page]


def test_nothing_is_loaded_from_elsewhere(site):
    """No fonts, scripts, styles or pictures; links that are followed by hand are another thing."""
    loaded = r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//|<link[^>]+href=["']?(?:https?:)?//"""
    found = [
        f"{page.relative_to(site)}: {tag}"
        for page in site.rglob("*.html")
        for tag in re.findall(loaded, page.read_text())
    ]
    assert not found


def test_links_to_the_source_are_named_without_an_address(site):
    page = (site / "architecture" / "index.html").read_text()
    assert "src/overlock" not in "".join(re.findall(r'href="([^"]*)"', page))


def test_commands_are_in_the_guide(site):
    guide = (site / "commands" / "index.html").read_text()
    assert not [command for command in COMMANDS if f"<code>overlock {command}</code>" not in guide]
