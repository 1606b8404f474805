"""Kernels are compiled once, and said to be."""

from __future__ import annotations

import importlib.util
import logging

import pytest
from numba.core import config

from overlock.kernels.numba import runtime as threads

SOURCE = "def nothing(call, thread, threads):\n    pass\n"


@pytest.fixture
def function(tmp_path):
    """In a file of its own, beside which its compiled form is kept."""
    path = tmp_path / "kernels.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.nothing


@pytest.fixture(autouse=True)
def not_told_yet(caplog):
    caplog.set_level(logging.INFO, logger="overlock")
    threads._tell.cache_clear()


def test_notes_of_compiling(function, caplog):
    """Of the first time alone; what is kept is taken as it is."""
    assert not threads.kernel(function).cache_hits
    assert "compiling kernels for this processor" in caplog.text
    caplog.clear()
    threads._tell.cache_clear()
    assert threads.kernel(function).cache_hits
    assert not caplog.text


def test_one_note_for_all(function, caplog, monkeypatch, tmp_path):
    threads.kernel(function)
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "other"))
    assert not threads.kernel(function).cache_hits
    assert len(caplog.records) == 1


def test_without_a_place_to_write(function, caplog, monkeypatch):
    """Compiled all the same, with a hint at what would spare it."""
    made = threads.cfunc

    def refuses(*arguments, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return made(*arguments, **options)

    monkeypatch.setattr(threads, "cfunc", refuses)
    assert threads.kernel(function).address
    assert "NUMBA_CACHE_DIR" in caplog.text
