"""What can go wrong on the way of a run, and what it does about it."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pictures import make_image
from PIL import Image
from runs import STEPS, assert_same, final_state, make_images, run, settings
from torch import Tensor

from overlock.training import TrainConfig
from overlock.training.classification import Classification
from overlock.training.runtime import CheckpointFile
from overlock.training.trainer import Trainer


@pytest.fixture
def data(tmp_path) -> Path:
    return make_images(tmp_path / "data")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing befell; its images are as those of every test."""
    root = tmp_path_factory.mktemp("whole")
    run(settings(make_images(root / "data"), root / "run"))
    return root / "run"


class NanGradient(torch.autograd.Function):
    """The same number, with a gradient that is none."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


FORMS = {
    "loss": lambda loss: loss * torch.nan,
    "infinite loss": lambda loss: loss + torch.inf,
    "gradient": NanGradient.apply,
}


def inject(monkeypatch, form: str, calls: range) -> None:
    """Make loss, gradient or images not finite in some of the calls for a loss."""
    original, count = Classification.loss, iter(range(10**6))

    def loss(self, network, batch):
        if next(count) not in calls:
            return original(self, network, batch)
        if form == "images":
            return original(self, network, batch._replace(images=batch.images * torch.nan))
        return FORMS[form](original(self, network, batch))

    monkeypatch.setattr(Classification, "loss", loss)


@pytest.mark.parametrize("form", [*FORMS, "images"])
def test_a_bad_step_changes_nothing_but_is_counted(data, tmp_path, monkeypatch, form):
    inject(monkeypatch, form, range(2, 3))
    seen: list[dict[str, Tensor]] = []
    original = Trainer.train_step

    def train_step(self, batches):
        before = snapshot(self)
        original(self, batches)
        seen.append(before | {"after." + name: t for name, t in snapshot(self).items()})

    monkeypatch.setattr(Trainer, "train_step", train_step)
    printed = run(settings(data, tmp_path / "run"))
    changed = [any(not torch.equal(s[n], s["after." + n]) for n in s if "after." + n in s) for s in seen]
    assert changed == [number != 2 for number in range(2 * STEPS)]
    assert "1 steps skipped" in printed
    assert all(t.isfinite().all() for t in final_state(tmp_path / "run").values())
    rows = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("loss")]) for row in rows[1:]]
    assert all(math.isfinite(loss) for loss in losses)


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    moments = {f"{i}.{n}": t for i, s in trainer.optimizer.state_dict()["state"].items() for n, t in s.items()}
    average = {f"average.{n}": t for n, t in trainer.average.module.state_dict().items()}
    state = trainer.raw_network.state_dict() | average
    return {name: t.clone() for name, t in (state | moments).items()}


def test_goes_back_to_the_last_checkpoint(data, tmp_path, monkeypatch):
    inject(monkeypatch, "loss", range(3, 5))
    printed = run(settings(data, tmp_path / "run", safety=dict(bad_steps=2)))
    assert printed.count("went back to the checkpoint of step 4 (rollback 1 of 3)") == 1
    assert "not finite 2 times in a row up to step 5" in printed
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["progress"]["rollbacks"] == 1
    assert state["progress"]["skipped"] == 2
    assert state["progress"]["epoch"] == 2


def test_gives_up_after_too_many_rollbacks(data, tmp_path, monkeypatch):
    inject(monkeypatch, "gradient", range(3, 1000))
    with pytest.raises(ValueError, match=r"after 2 rollbacks to a checkpoint; lower optim\.lr"):
        run(settings(data, tmp_path / "run", safety=dict(bad_steps=2, rollbacks=2)))
    monkeypatch.undo()
    run(settings(data, tmp_path / "run", safety=dict(bad_steps=2, rollbacks=2)), resume=True)
    assert all(t.isfinite().all() for t in final_state(tmp_path / "run").values())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_with_a_large_rate_stays_finite(data, tmp_path, monkeypatch, precision):
    inject(monkeypatch, "gradient", range(5, 6))
    config = settings(data, tmp_path / "run", runtime=dict(precision=precision), optim=dict(lr=0.05, warmup_epochs=0))
    run(config)
    assert all(t.isfinite().all() for t in final_state(tmp_path / "run").values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_for_500_steps(tmp_path, precision):
    make_images(tmp_path / "data")
    config = settings(
        tmp_path / "data", tmp_path / "run", model="overlock_atto", epochs=125, validate_every=125,
        runtime=dict(precision=precision), optim=dict(lr=5e-3, warmup_epochs=0), safety=dict(steps=None),
    )  # fmt: skip
    run(config)
    state = final_state(tmp_path / "run")
    assert all(t.isfinite().all() for t in state.values())
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["progress"]["rollbacks"] == 0
    assert checkpoint["progress"]["skipped"] <= (20 if precision == "fp16" else 0)  # while the loss's scale is found


@pytest.mark.parametrize(
    "damage", ["cut", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flipped", "empty"))]
)
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(data, whole, tmp_path, monkeypatch, damage):
    config = settings(data, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish_epoch", lambda self: os.kill(os.getpid(), signal.SIGTERM) or self.save_or_stop())
        with pytest.raises(Exception, match="stopped and saved"):
            run(config)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 3] ^= 0xFF
    last.write_bytes(b"" if damage == "empty" else bytes(content))
    printed = run(config, resume=True)
    assert "last.ckpt is damaged" in printed
    assert "going on from previous.ckpt" in printed
    assert_same(tmp_path / "run", whole)


def test_no_checkpoint_is_readable(data, tmp_path):
    config = settings(data, tmp_path / "run", epochs=1)
    run(config)
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / "run" / "checkpoints" / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no checkpoint can be read: .*last\.ckpt.*previous\.ckpt.*--overwrite"):
        run(config, resume=True)


def test_a_full_disk(data, whole, tmp_path, monkeypatch):
    """The write of the third checkpoint fails for want of room, after some of it is written."""
    config, writes = settings(data, tmp_path / "run"), []
    original = CheckpointFile.save_checkpoint

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        writes.append(path)
        if len(writes) == 3:
            Path(path).write_bytes(b"x" * 1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, checkpoint, path)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFile, "save_checkpoint", save_checkpoint)
        with pytest.raises(ValueError, match=r"the disk is full.*can go on from .*last\.ckpt: make room"):
            run(config)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["last.ckpt", "previous.ckpt"]
    run(config, resume=True)
    assert_same(tmp_path / "run", whole)


def test_a_file_size_limit(data, tmp_path):
    """Which the system enforces as it does a quota."""
    command = write_command(settings(data, tmp_path / "run", model="overlock_atto"), tmp_path)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "a checkpoint cannot be written (the disk is full)" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def write_command(config: TrainConfig, folder: Path) -> list[str]:
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    return [sys.executable, "-m", "overlock.cli", "train", "--config", str(folder / "config.yaml")]


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=30m none "$DISK" || exit 77
"$@"; echo "ended with $?"
ls -A "$DISK/run/checkpoints"
mount -o remount,size=100m "$DISK" && "$@" --resume && cp -r "$DISK/run" "$COPY"
"""


@pytest.mark.slow
def test_a_full_disk_for_real(data, tmp_path):
    """A file system of 30 MB has room for two checkpoints, not for the third; given more, the run goes on."""
    (tmp_path / "disk").mkdir()
    run(settings(data, tmp_path / "whole", model="overlock_atto"))
    command = write_command(settings(data, tmp_path / "disk" / "run", model="overlock_atto"), tmp_path)
    places = dict(DISK=str(tmp_path / "disk"), COPY=str(tmp_path / "copy"))
    try:
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh", *command],
            capture_output=True, text=True, timeout=240, check=False, env=os.environ | places,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "a checkpoint cannot be written (the disk is full); the run can go on from" in done.stderr
    assert "ended with 2\nlast.ckpt\nprevious.ckpt\n" in done.stdout
    assert_same(tmp_path / "copy", tmp_path / "whole")


def test_a_lost_loading_process(data, whole, tmp_path, monkeypatch):
    config = settings(data, tmp_path / "run", runtime=dict(workers=1))
    original, count = Trainer.train_step, iter(range(100))

    def train_step(self, batches):
        if next(count) == 1:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
                child.join()
        original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        patch.setattr("overlock.data.loaders.PREFETCH", 1)
        with pytest.raises(ValueError, match=r"a process that loads images was lost.*repeat with --resume"):
            run(config)
    run(config, resume=True)
    assert_same(tmp_path / "run", whole)


def spoil(data: Path, count: int) -> list[Path]:
    files = sorted((data / "red").glob("*.png"))[:count]
    for number, file in enumerate(files):
        file.write_bytes(b"" if number % 2 else file.read_bytes()[:100])
    return files


def test_unreadable_images_are_skipped_and_listed(data, tmp_path, monkeypatch):
    files = spoil(data, 4)
    run(settings(data, tmp_path / "run"))
    listed = (tmp_path / "run" / "unreadable.txt").read_text().splitlines()
    assert sorted(line.partition(": ")[0] for line in listed) == sorted(map(str, files))
    config = settings(data, tmp_path / "again", runtime=dict(workers=2))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish_epoch", lambda self: os.kill(os.getpid(), signal.SIGTERM) or self.save_or_stop())
        with pytest.raises(Exception, match="stopped and saved"):
            run(config)
    run(config, resume=True)
    assert_same(tmp_path / "run", tmp_path / "again")
    assert sorted((tmp_path / "again" / "unreadable.txt").read_text().splitlines()) == sorted(listed)


def test_another_image_stands_in_where_one_is_a_batch(data, tmp_path, monkeypatch):
    """A run with forward passes of one image ends, and a resumed one in the same bits."""
    files = spoil(data, 4)
    changes = dict(loss=dict(mixup=0.0, cutmix=0.0), runtime=dict(micro_batch=1))
    run(settings(data, tmp_path / "run", **changes))
    listed = (tmp_path / "run" / "unreadable.txt").read_text().splitlines()
    assert {line.partition(": ")[0] for line in listed} <= set(map(str, files))
    config = settings(data, tmp_path / "again", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish_epoch", lambda self: os.kill(os.getpid(), signal.SIGTERM) or self.save_or_stop())
        with pytest.raises(Exception, match="stopped and saved"):
            run(config)
    run(config, resume=True)
    assert_same(tmp_path / "run", tmp_path / "again")


def test_no_image_can_be_read(data, tmp_path):
    for file in data.glob("*/*.png"):
        file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"none of the \d+ images tried for a batch can be read; the first: .*\.png"):
        run(settings(data, tmp_path / "run"))


def test_too_many_unreadable_images(data, tmp_path):
    files = spoil(data, 5)
    with pytest.raises(ValueError, match=r"\d images could not be read, more than safety\.unreadable 2; they are"):
        run(settings(data, tmp_path / "run", safety=dict(unreadable=2)))
    assert len((tmp_path / "run" / "unreadable.txt").read_text().splitlines()) >= 3
    for file in files:
        make_image("red", 1).save(file)
    run(settings(data, tmp_path / "run", safety=dict(unreadable=9)), resume=True)


def test_a_class_that_vanishes(data, tmp_path, monkeypatch):
    config = settings(data, tmp_path / "run", safety=dict(unreadable=2))
    original = Trainer.finish_epoch

    def finish_epoch(self):
        original(self)
        shutil.rmtree(data / "green", ignore_errors=True)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish_epoch", finish_epoch)
        with pytest.raises(ValueError, match=r"could not be read.*green.*no such image"):
            run(config)
    with pytest.raises(ValueError, match="class 'green' is no longer there since the run was begun"):
        run(config, resume=True)
    (data / "green").mkdir()
    make_image("green", 0).save(data / "green" / "0.png")
    make_image("green", 1).save(data / "green" / "1.png")
    with pytest.raises(ValueError, match="images where the run was begun with"):
        run(config, resume=True)


def test_images_of_every_kind(tmp_path):
    data = make_images(tmp_path / "data", 2)
    red = data / "red"
    image = make_image("red", 5)
    image.convert("CMYK").save(red / "cmyk.jpg")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(red / "sixteen.png")
    image.convert("P").save(red / "palette.png", transparency=3)
    image.convert("RGBA").save(red / "alpha.png")
    image.convert("1").save(red / "bit.tiff")
    image.save(red / "名前 ñandú 'quoted' \U0001f9a9.png")
    image.save(red / f"{'long' * 60}.png")
    image.save(red / "UPPER.WEBP")
    run(settings(data, tmp_path / "run", epochs=1))
    assert not (tmp_path / "run" / "unreadable.txt").exists()


IN_A_PROCESS = """
import sys
import overlock.data.datasets as datasets
from overlock.cli.main import main

read = datasets.ImageDataset.__getitem__

def fail(self, draw):
    if not isinstance(draw, datasets.Draw):  # of the test
        raise ValueError("a fault of a loading process")
    return read(self, draw)

datasets.ImageDataset.__getitem__ = fail
sys.exit(main())
"""


def test_a_fault_of_a_loading_process_is_one_sentence(data, tmp_path):
    command = write_command(settings(data, tmp_path / "run", runtime=dict(workers=2)), tmp_path)
    command[1:3] = ["-c", IN_A_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: a fault of a loading process\n"
