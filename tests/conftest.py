"""What the tests share: the reference data, settings of the property tests, one thread; and which ones need a GPU.

A machine with a GPU may lack most of what the other tests need, so that nothing here imports it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import official_weights
import pytest
import torch
from torch import Tensor

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("tests", deadline=None, derandomize=True, max_examples=30, print_blob=True)
    settings.load_profile("tests")
torch.set_num_threads(1)


def _wants_gpu(config: pytest.Config) -> bool:
    return re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")) is not None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu``, only files with such tests are imported; others want packages that may not be there."""
    others = _wants_gpu(config) and collection_path.suffix == ".py" and "mark.gpu" not in collection_path.read_text()
    return True if others else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``-m gpu`` alone is the core; the rest, half an hour of compilation, is ``-m "gpu and slow"``."""
    if _wants_gpu(config) and "slow" not in config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def default_file() -> Path:
    """The weights that come with the package."""
    from overlock.deploy.classify import DEFAULT_FILE

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
