"""What the tests share: the reference data, settings of the property tests, one thread."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from overlock.deploy.predict import DEFAULT_FILE

SHARED = Path(__file__).resolve().parents[2] / "shared" / "official"

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=30, print_blob=True)
settings.load_profile("tests")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def default_file() -> Path:
    """The weights that come with the package."""
    return DEFAULT_FILE


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets; tests that need it are skipped where it is absent."""
    path = SHARED.parent / "data"
    if not path.is_dir():
        pytest.skip(f"the data sets are not at {path}")
    return path


@pytest.fixture(scope="session")
def official() -> ModuleType:
    """The generator of the reference weights and images; tests that need it are skipped where it is absent."""
    path = SHARED / "weights.py"
    if not path.is_file():
        pytest.skip(f"the reference data are not at {SHARED}")
    spec = importlib.util.spec_from_file_location("official_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def official_state(official):
    """official_state(variant, form): the reference weights under the authors' names."""

    def make(variant: str, form: str, seed: int = 0) -> dict[str, Tensor]:
        arrays = official.official_state(official.load_spec(variant, form), seed)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    return make
