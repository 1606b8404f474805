"""A network whose kernels are not compiled yet does its work without them."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers import images, randomise, relative_error

import overlock
from overlock.deploy import Predictor
from overlock.fused import meanwhile, stage_operators
from overlock.kernels.numba import cache
from overlock.kernels.numba.compilation import compile_kernels
from overlock.ops import backend


class Beside:
    """In place of a process that compiles."""

    def __init__(self) -> None:
        started.append(self)
        self.has_ended = False


started: list[Beside] = []


@pytest.fixture(autouse=True, scope="module")
def already_in_memory():
    """So that no test has to wait for a kernel that it calls after all."""
    compile_kernels()


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(meanwhile, "_kernels", meanwhile._Kernels())
    monkeypatch.setattr(meanwhile, "Compilation", Beside)
    started.clear()


@pytest.fixture(scope="module")
def network():
    return overlock.fuse(randomise(timm.create_model("overlock_atto", num_classes=5)))


@pytest.fixture
def kernel_calls(monkeypatch):
    calls = []
    run = stage_operators._run
    monkeypatch.setattr(stage_operators, "_run", lambda *inputs: (calls.append(1), run(*inputs))[1])
    return calls


@torch.inference_mode()
def answer(network):
    with meanwhile.without_waiting(network):
        return network(images(2, 3, 64, 48))


def test_a_small_job_runs_on_plain_pytorch(network, kernel_calls):
    """With the results of the kernels, but for rounding."""
    plain = answer(network)
    assert not kernel_calls
    assert not started
    with torch.inference_mode():
        by_kernels = network(images(2, 3, 64, 48))
    assert kernel_calls
    assert relative_error(plain, by_kernels) < 2e-6


def test_a_long_job_has_them_compiled_beside_it_and_goes_on_with_them(network, kernel_calls, monkeypatch):
    monkeypatch.setattr(meanwhile, "PATIENCE", 0.0)
    first, second = answer(network), answer(network)
    assert len(started) == 1
    assert not kernel_calls
    started[0].has_ended = True
    third = answer(network)
    assert kernel_calls
    assert torch.equal(first, second)
    assert relative_error(third, first) < 2e-6


def test_kernels_that_are_compiled_are_taken_at_once(network, kernel_calls, monkeypatch):
    monkeypatch.setattr(cache, "are_compiled", lambda: True)
    answer(network)
    assert kernel_calls
    assert not started


def test_where_no_process_can_be_started_they_are_compiled_in_this_one(network, kernel_calls, monkeypatch):
    def refuse() -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(meanwhile, "PATIENCE", 0.0)
    monkeypatch.setattr(meanwhile, "Compilation", refuse)
    answer(network)
    assert not kernel_calls
    answer(network)
    assert kernel_calls


def test_a_backend_that_is_asked_for_is_taken(network, kernel_calls):
    with backend("cpu"):
        answer(network)
    assert kernel_calls


def test_other_networks_are_left_alone(monkeypatch):
    monkeypatch.setattr(meanwhile, "PATIENCE", 0.0)
    answer(overlock.fuse(timm.create_model("overlock_atto"), kernels=False))
    answer(timm.create_model("resnet18"))
    assert not started


def test_predictors_do_not_wait(kernel_calls):
    image = torch.rand(3, 40, 50)
    plain = Predictor.default()(image)
    assert not kernel_calls
    with backend("cpu"):
        by_kernels = Predictor.default()(image)
    assert kernel_calls
    assert plain.labels == by_kernels.labels
    assert plain.probabilities == pytest.approx(by_kernels.probabilities, abs=1e-6)
