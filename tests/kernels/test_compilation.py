"""Kernels compiled ahead and beside the work, and the folder that they are kept in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import overlock
from overlock.cli import main
from overlock.kernels.numba import cache, compilation, runtime, simd

# Takes every kernel from where it is kept, or fails.
TAKE = """
from overlock.kernels.numba import cache, compilation, kept
def refuse(self):
    raise AssertionError(f"{self.__name__} is not kept")
kept.KeptFunction._compile_uncached = refuse
assert cache.are_compiled()
compilation.compile_kernels((*cache.INFERENCE, *cache.TRAINING), also_bfloat16=True)
print(cache.__file__)
"""


def test_a_folder_serves_another_installation(tmp_path):
    """Elsewhere, of another date and not to be written, as in a container's image: nothing is compiled again."""
    for folder in filter(Path.is_dir, cache.folders()):  # saves a minute: what other tests compiled is not again
        shutil.copytree(folder, tmp_path / "made" / folder.name, dirs_exist_ok=True)
    made = subprocess.run(
        [sys.executable, "-m", "overlock.cli", "compile", "--output", str(tmp_path / "made")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"OVERLOCK_CACHE={tmp_path / 'made'}" in made.stdout
    shipped, package = tmp_path / "shipped", tmp_path / "site" / "overlock"
    (tmp_path / "made").rename(shipped)
    shutil.copytree(Path(overlock.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    for path in package.rglob("*.py"):
        os.utime(path, (0, 1))
    before = sorted((path, path.stat().st_mtime_ns) for path in shipped.rglob("*"))
    for path in (*shipped.rglob("*"), shipped):
        path.chmod(path.stat().st_mode & 0o555)
    environment = dict(PYTHONPATH=str(tmp_path / "site"), XDG_CACHE_HOME=str(tmp_path / "user"))
    environment |= {cache.ENVIRONMENT_VARIABLE: str(shipped)}
    done = subprocess.run(
        [sys.executable, "-c", TAKE], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    for path in (shipped, *shipped.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(package)
    assert sorted((path, path.stat().st_mtime_ns) for path in shipped.rglob("*")) == before


def test_a_folder_that_cannot_be_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")  # what the command sets is taken back
    (tmp_path / "file").touch()
    assert main(["compile", "--output", str(tmp_path / "file" / "kernels")]) == 2
    assert "kernels: cannot write here" in capsys.readouterr().err


def test_kernels_are_found_in_the_sources():
    """By their names; which are all that a fused network calls, is for the folder that is shipped to show."""
    compilation.compile_kernels()
    files = {path.name.rpartition("-")[0] for path in cache.kept_files()}
    assert {name for name in files if name.partition(".")[0] in cache.INFERENCE} >= cache._kernels()
    assert {"gemm.gemm", "contmix_kernels.contmix", "depthwise.depthwise"} < cache._kernels()


def test_what_a_kernel_depends_on_names_its_folder(monkeypatch):
    """Another processor, another folder."""
    name = cache._name()
    cache._name.cache_clear()
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert cache._name() != name
    cache._name.cache_clear()


@pytest.fixture
def program(monkeypatch, tmp_path):
    """In place of the compilation, something that is quick and tells where it would keep the kernels."""
    code = "import os, pathlib, time; pathlib.Path({told!r}).write_text(os.environ['OVERLOCK_CACHE']); {then}"
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "kept"))

    def set_program(then: str) -> Path:
        monkeypatch.setattr(compilation, "PROGRAM", code.format(told=str(tmp_path / "told"), then=then))
        return tmp_path / "told"

    return set_program


def wait(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened")


def test_beside_the_work(program, tmp_path):
    told = program("pass")
    beside = compilation.Compilation()
    wait(lambda: beside.has_ended)
    assert told.read_text() == str(tmp_path / "kept")


def test_it_ends_with_the_work(program):
    told = program("time.sleep(100)")
    beside = compilation.Compilation()
    wait(told.exists)
    assert not beside.has_ended
    beside.stop()
    assert beside.has_ended


def test_without_a_place_to_write_it_has_one_of_its_own(program, monkeypatch):
    monkeypatch.setattr(cache, "is_writable", lambda _: False)
    monkeypatch.setattr(cache, "_further", [])
    told = program("pass")
    beside = compilation.Compilation()
    wait(lambda: beside.has_ended)
    own = Path(told.read_text())
    assert own.is_dir()
    assert any(folder.parent == own for folder in cache.folders())
    beside.stop()
    assert not own.exists()


@pytest.mark.parametrize("has", [False, True])
def test_products_in_bfloat16_are_compiled_where_they_run(has, monkeypatch):
    seen = []
    monkeypatch.setattr(simd, "HAS_BFLOAT16", has)
    monkeypatch.setattr(runtime.Kernel, "compile_for_bfloat16", lambda self: seen.append(self.function.__name__))
    compilation.compile_kernels(("gemm", "depthwise", "expand_filter"), also_bfloat16=True)
    assert "depthwise" in seen
    assert ("gemm" in seen, "expand_and_filter" in seen) == (has, has)
