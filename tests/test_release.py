"""What a release is: a wheel and an sdist with all that the package needs, whose texts a package index can show."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import overlock

ROOT = Path(__file__).resolve().parents[1]
HOME = "https://example.org/overlock"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source") / "overlock", tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    source.mkdir()
    subprocess.run(["tar", "x"], cwd=source, input=tracked, check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    environment = os.environ | {"OVERLOCK_URL": HOME}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(dist) -> zipfile.ZipFile:
    (file,) = dist.glob("*.whl")
    return zipfile.ZipFile(file)


def test_twine_finds_no_fault(dist):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_all(wheel):
    """Every module, and the files beside them: weights, tables, the marker of types."""
    package = ROOT / "src"
    files = [file for file in (package / "overlock").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    wanted = {str(file.relative_to(package)) for file in files if file.suffix not in {".nbi", ".nbc"}}
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted &= {line.removeprefix("src/") for line in tracked.splitlines()}
    assert not wanted - set(wheel.namelist())
    assert any(name.endswith(".safetensors") for name in wheel.namelist())


def test_the_sdist_holds_all_that_the_build_needs(dist):
    (file,) = dist.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/overlock/__init__.py"} <= names


def test_the_version(wheel):
    metadata = email.message_from_bytes(
        wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA")))
    )
    assert metadata["Version"] == overlock.__version__
    newest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == overlock.__version__


def test_links_of_the_readme_are_absolute_on_a_package_index(wheel):
    metadata = email.message_from_bytes(
        wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA")))
    )
    text = str(metadata.get_payload())
    assert f"]({HOME}/raw/v{overlock.__version__}/docs/evidence_cam.jpg)" in text
    assert not re.findall(r"\]\((?!https?:|#)[^)]*\)", text)


def test_it_runs_where_it_is_unpacked(wheel, tmp_path):
    """With the libraries at hand, but without the source."""
    wheel.extractall(tmp_path)
    code = "from overlock.deploy import Predictor; import sys; print(Predictor.default()(sys.argv[1]).labels[0])"
    command = [sys.executable, "-c", code, str(ROOT / "examples" / "photos" / "cat.jpg")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.stdout.strip() == "cat", done.stderr
