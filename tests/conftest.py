"""What the tests share: the reference data, settings of the property tests, one thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import official_weights
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from overlock.deploy.classify import DEFAULT_FILE

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=30, print_blob=True)
settings.load_profile("tests")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def default_file() -> Path:
    """The weights that come with the package."""
    return DEFAULT_FILE


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets, too large to come with the tests: those that need it are skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"the data sets are not at {DATA}")
    return DATA


@pytest.fixture(scope="session")
def official_state() -> Callable[..., dict[str, Tensor]]:
    """official_state(variant, form): weights under the authors' names, those of the golden outputs."""

    def make(variant: str, form: str, seed: int = 0) -> dict[str, Tensor]:
        arrays = official_weights.draw_state(official_weights.load_spec(variant, form), seed)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    return make
