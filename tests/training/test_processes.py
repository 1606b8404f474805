"""Several processes compute what one does."""

from __future__ import annotations

import csv
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import final_state, launch, make_images, run, settings
from safetensors.torch import load_file
from torch import nn

from overlock.data.loaders import Share
from overlock.training.sync_bn import CpuSyncBatchNorm, synchronise_norms


def losses(folder: Path) -> list[float]:
    with (folder / "log.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) for name in ("loss", "test_loss")]


TWENTY_STEPS = dict(
    model="overlock_atto",
    epochs=5,
    batch_size=8,
    image_size=64,
    drop_path=0.0,
    optim=dict(lr=1e-3, base_batch_size=8, warmup_epochs=1.0),
    safety=dict(steps=None),
)


@pytest.mark.slow
@pytest.mark.parametrize("optim", [dict(name="sgd", lr=0.003), dict(eps=1e-3)], ids=["sgd", "adamw"])
def test_two_processes_equal_one(tmp_path, optim):
    """20 steps with batch norm, mixing and augmentation.

    The stochastic depth alone, drawn by each process, is left out. AdamW has a larger eps: with the usual one
    parameters whose gradient is zero but for rounding, such as biases before a norm, move by the sign of that rounding.
    """
    changes = TWENTY_STEPS | dict(optim=TWENTY_STEPS["optim"] | optim)
    make_images(tmp_path / "data", 14)
    run(settings(tmp_path / "data", tmp_path / "one", **changes))
    process = launch(tmp_path, settings(tmp_path / "data", tmp_path / "two", **changes))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    assert one.keys() == two.keys()
    for part in ("network.", "average.", "model."):
        names = [name for name in one if name.startswith(part) and one[name].is_floating_point()]
        a, b = (torch.cat([state[name].flatten().double() for name in names]) for state in (one, two))
        assert float((a - b).norm() / a.norm()) < 1e-4


SHARDED = dict(runtime=dict(strategy="fsdp"), ema=dict(decay=0.0))


@pytest.mark.slow
@pytest.mark.parametrize("optim", [dict(name="sgd", lr=0.003), dict(eps=1e-3)], ids=["sgd", "adamw"])
def test_a_network_spread_over_two_processes_equals_one(tmp_path, optim):
    """Nine images to test on, in batches of four, are two batches for the first process and one for the other."""
    changes = TWENTY_STEPS | dict(epochs=2, batch_size=4, optim=TWENTY_STEPS["optim"] | dict(base_batch_size=4) | optim)
    make_images(tmp_path / "data", 15)
    run(settings(tmp_path / "data", tmp_path / "one", **changes | dict(ema=SHARDED["ema"])))
    process = launch(tmp_path, settings(tmp_path / "data", tmp_path / "two", **changes | SHARDED))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    a, b = (torch.cat([t.flatten().double() for t in state.values()]) for state in (one, two))
    assert float((a - b).norm() / a.norm()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, SHARDED], ids=["ddp", "fsdp"])
def test_two_processes_stop_and_go_on(tmp_path, changes):
    make_images(tmp_path / "data", 14)
    changes = TWENTY_STEPS | changes
    whole = launch(tmp_path, settings(tmp_path / "data", tmp_path / "whole", **changes))
    assert whole.wait(timeout=300) == 0
    config = settings(tmp_path / "data", tmp_path / "run", **changes)
    process = launch(tmp_path, config)
    checkpoint = tmp_path / "run" / "checkpoints" / "previous.ckpt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    again = launch(tmp_path, config, "--resume")
    printed, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "going on from epoch" in printed
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def norms_of_a_process(rank: int, store: str, x: torch.Tensor, momentum: float | None, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    norm = synchronise_norms(nn.Sequential(make_norm(x.size(1), momentum)), cuda=False)
    assert isinstance(norm[0], CpuSyncBatchNorm)
    part = x.chunk(2)[rank].clone().requires_grad_()
    y = norm(part)
    y.square().mul(torch.arange(y.numel()).view_as(y) % 5).sum().backward()
    gradient = norm[0].weight.grad.clone()
    torch.distributed.all_reduce(gradient)
    results[rank] = (y.detach(), part.grad, gradient, norm[0].running_mean, norm[0].running_var)
    torch.distributed.destroy_process_group()


def make_norm(channels: int, momentum: float | None) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=momentum)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, channels))
        norm.bias.copy_(torch.linspace(-1, 1, channels))
    return norm


@pytest.mark.parametrize("momentum", [0.1, None])
def test_norm_over_two_processes_is_that_of_the_joint_batch(momentum, tmp_path):
    context = torch.multiprocessing.get_context("fork")
    torch.manual_seed(0)
    x = torch.randn(8, 6, 5, 5) * 3 + 1
    with context.Manager() as manager:
        results = manager.dict()
        processes = [
            context.Process(target=norms_of_a_process, args=(rank, str(tmp_path / "store"), x, momentum, results))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=60)
        assert [process.exitcode for process in processes] == [0, 0]
        got = [results[rank] for rank in range(2)]
    norm = make_norm(6, momentum)
    whole = x.clone().requires_grad_()
    y = norm(whole)
    halves = [half.square().mul(torch.arange(half.numel()).view_as(half) % 5).sum() for half in y.chunk(2)]
    sum(halves).backward()
    torch.testing.assert_close(torch.cat([g[0] for g in got]), y.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([g[1] for g in got]), whole.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[0][2], norm.weight.grad, atol=1e-3, rtol=1e-4)
    for rank in range(2):
        torch.testing.assert_close(got[rank][3], norm.running_mean)
        torch.testing.assert_close(got[rank][4], norm.running_var)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 4, 5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_shares_are_a_partition_that_keeps_the_pairs(world, micro_batch, accumulate):
    shares = [
        Share(rank=rank, world=world, micro_batch=micro_batch, accumulate=accumulate).places() for rank in range(world)
    ]
    places = [place for share in shares for part in share for place in part]
    assert sorted(places) == list(range(world * micro_batch * accumulate))
    size = world * micro_batch
    for share in shares:
        for step, part in enumerate(share):
            assert len(part) == micro_batch
            for i in range(micro_batch // 2):  # what mixup joins within the part is joined within the whole
                assert part[i] + part[-1 - i] == 2 * step * size + size - 1
