"""Kernels are compiled once, and said to be."""

from __future__ import annotations

import importlib.util
import logging

import pytest

from overlock.kernels.numba import cache, runtime

SOURCE = "def nothing(call, thread, threads):\n    pass\n"


@pytest.fixture
def function(tmp_path):
    """In a file of its own."""
    path = tmp_path / "kernels.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.nothing


@pytest.fixture(autouse=True)
def empty_folder(caplog, monkeypatch, tmp_path):
    """Of kernels; nothing was told yet."""
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "kept"))
    caplog.set_level(logging.INFO, logger="overlock")
    runtime._tell.cache_clear()


def compile_anew(function):
    return runtime.kernel()(function).compiled


def test_notes_of_compiling(function, caplog):
    """Of the first time alone; what is kept is taken as it is."""
    assert not compile_anew(function).was_kept
    assert "compiling kernels for this processor" in caplog.text
    caplog.clear()
    runtime._tell.cache_clear()
    assert compile_anew(function).was_kept
    assert not caplog.text


def test_one_note_for_all(function, caplog, monkeypatch, tmp_path):
    compile_anew(function)
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "other"))
    assert not compile_anew(function).was_kept
    assert len(caplog.records) == 1


def test_without_a_place_to_write(function, caplog, monkeypatch):
    """Compiled all the same, with a hint at what would spare it."""
    monkeypatch.setattr(cache, "is_writable", lambda _: False)
    compiled = compile_anew(function)
    assert compiled.address
    assert not compiled.is_kept
    assert cache.ENVIRONMENT_VARIABLE in caplog.text


def test_a_full_disk_costs_no_kernel(function, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    monkeypatch.setattr(cache, "folders", lambda: [tmp_path / "kept"])
    compiled = compile_anew(function)
    assert compiled.address
    assert not compiled.is_kept
    assert not [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]


def test_a_file_cut_short_is_compiled_anew(function):
    compile_anew(function)
    (path,) = cache.kept_files()
    path.write_bytes(path.read_bytes()[:100])
    assert not compile_anew(function).was_kept
    assert compile_anew(function).was_kept


def test_a_folder_that_cannot_be_written_is_read(function, monkeypatch):
    compile_anew(function)
    monkeypatch.setattr(cache, "is_writable", lambda _: False)
    assert compile_anew(function).was_kept
