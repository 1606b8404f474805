"""``overlock embed``: the same files however the work is shared out or interrupted, and nothing lost in silence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import randomise
from pictures import make_classes, make_image

from overlock.checkpoints import HEADS, Record, save_model
from overlock.cli import main
from overlock.data.shards import pack
from overlock.deploy import Embedder
from overlock.embeddings import run as run_module
from overlock.embeddings.processes import this_process
from overlock.embeddings.sources import ImageList

pq = pytest.importorskip("pyarrow.parquet")
ARGUMENTS = dict(
    num_classes=3, dims=(8, 12, 16, 24), base_depths=(1, 1, 1), overview_depth=1, focus_depths=(1, 1), groups=(2, 3),
    kernel_sizes=(7, 5, 9, 7), head_width=16,
)  # fmt: skip
"""Of a tiny network."""
PREPARED = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "atto.safetensors"
    record = Record(model="overlock_atto", model_args=ARGUMENTS, classes=tuple("abc"), preprocessing=PREPARED)
    save_model(path, randomise(timm.create_model("overlock_atto", **ARGUMENTS)).state_dict(), record)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three classes of seven."""
    return make_classes(tmp_path_factory.mktemp("images"), 7)


@pytest.fixture(scope="module")
def whole(images, checkpoint, tmp_path_factory) -> dict[str, bytes]:
    """The files of an unbroken run: three shards, of 8, 8 and 5 images."""
    folder = tmp_path_factory.mktemp("whole")
    assert embed(images, folder, checkpoint) == 0
    return contents(folder)


def words(images: Path, folder: Path, checkpoint: Path, *more: str) -> list[str]:
    options = ["--checkpoint", str(checkpoint), "--batch_size", "4", "--shard_images", "8", "--device", "cpu"]
    return ["embed", str(images), "--out", str(folder), *options, *more]


def embed(*arguments, workers: int = 0) -> int:
    return main([*words(*arguments), "--workers", str(workers)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rows(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_rows(images, checkpoint, whole, tmp_path):
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    found = rows(tmp_path)
    files = sorted(images.rglob("*.png"))
    assert list(whole) == [f"embeddings-{i:05d}-of-00003.parquet" for i in range(3)]
    assert [row["id"] for row in found] == [path.relative_to(images).as_posix() for path in files]
    assert [row["label"] for row in found] == [path.parent.name for path in files]
    assert {(row["width"], row["height"], row["error"]) for row in found} == {(32, 32, None)}
    vectors = Embedder.from_checkpoint(checkpoint, device="cpu")(files, batch_size=4)
    np.testing.assert_allclose([row["vector"] for row in found], [one.vector for one in vectors], atol=1e-5)


def test_loading_ahead_changes_nothing(images, checkpoint, whole, tmp_path):
    assert embed(images, tmp_path, checkpoint, workers=2) == 0
    assert contents(tmp_path) == whole


def test_interrupted_and_resumed(images, checkpoint, whole, tmp_path, monkeypatch, capsys):
    """After the first file, and with a file cut off as by a full disk."""
    write, written = run_module.write_shard, []

    def write_one(path, *arguments):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "write_shard", write_one)
        assert embed(images, tmp_path, checkpoint) == 130
    assert list(contents(tmp_path)) == list(whole)[:1]
    last = list(whole)[2]
    (tmp_path / last).write_bytes(whole[last][:1000])
    stamp = written[0].stat().st_mtime_ns
    assert embed(images, tmp_path, checkpoint) == 0
    assert contents(tmp_path) == whole
    assert written[0].stat().st_mtime_ns == stamp
    assert "1 shards are there already" in capsys.readouterr().out


def test_two_processes(images, checkpoint, whole, tmp_path, monkeypatch):
    """One after the other, as torchrun names them; together: test_killed_under_torchrun."""
    for rank in (1, 0):
        names = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, TORCHELASTIC_RUN_ID="none")
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        assert embed(images, tmp_path, checkpoint) == 0
        assert len(contents(tmp_path)) == (1 if rank == 1 else 3)
    assert contents(tmp_path) == whole


def test_launchers(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "6")  # of a script of sbatch, which runs alone
    assert this_process() == (0, 1, 0)
    for name, value in dict(SLURM_PROCID=5, SLURM_STEP_NUM_TASKS=6, SLURM_LOCALID=1).items():
        monkeypatch.setenv(name, str(value))
    assert this_process() == (5, 6, 1)


def test_an_unreadable_image(checkpoint, tmp_path, capsys):
    images = make_classes(tmp_path / "images", 3)
    (images / "green" / "1.png").write_bytes(b"no image")
    assert embed(images, tmp_path / "out", checkpoint, "--json") == 1
    told = capsys.readouterr()
    assert "skipped green/1.png: not an image" in told.err
    report = json.loads(told.out)
    assert (report["images"], len(report["failures"]), report["origin"]["dim"]) == (8, 1, 16)
    assert report["speed"] > 0
    assert report["bare_speed"] > 0
    bad = rows(tmp_path / "out")[4]
    assert (bad["id"], bad["vector"], bad["width"]) == ("green/1.png", None, None)
    assert bad["error"].startswith("not an image")
    assert embed(images, tmp_path / "out", checkpoint) == 1  # though nothing was left to do
    assert "1 of 9 images have no vector" in capsys.readouterr().err


def test_an_unreadable_image_ends_no_other_process(checkpoint, tmp_path, monkeypatch, capsys):
    """A launcher ends all processes where one returns another code than 0."""
    images = make_classes(tmp_path / "images", 3)
    (images / "green" / "1.png").write_bytes(b"no image")
    with monkeypatch.context() as patched:
        for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, TORCHELASTIC_RUN_ID="none").items():
            patched.setenv(name, str(value))
        assert embed(images, tmp_path / "out", checkpoint) == 0
    assert "process 0 of 2: 1 of 8 images have no vector" in capsys.readouterr().err
    assert embed(images, tmp_path / "out", checkpoint) == 1


def test_none_readable(checkpoint, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    assert embed(tmp_path / "images", tmp_path / "out", checkpoint) == 2


@pytest.mark.parametrize("form", ["webdataset", "folders"])
def test_tar_files(form, tmp_path):
    """The same images and classes as in the folder that they were made of."""
    images = make_classes(tmp_path / "images", 4)
    if form == "webdataset":
        pack(images, tmp_path / "tars", shard_images=5)
    else:
        (tmp_path / "tars").mkdir()
        subprocess.run(["tar", "-cf", tmp_path / "tars" / "all.tar", "-C", images, "red", "green", "blue"], check=True)
    packed, plain = ImageList(tmp_path / "tars"), ImageList(images)
    assert {entry.id.partition(".tar/")[1] for entry in packed} == {".tar/"}
    contents = [{(one.read(i)[0].tobytes(), one[i].label) for i in range(len(one))} for one in (packed, plain)]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 12


@pytest.mark.slow
def test_embedded_from_tar_files(images, checkpoint, tmp_path):
    pack(images, tmp_path / "tars", shard_images=5)
    assert embed(tmp_path / "tars", tmp_path / "out", checkpoint) == 0
    assert embed(images, tmp_path / "plain", checkpoint) == 0
    sorted_vectors = [np.sort([row["vector"] for row in rows(tmp_path / name)], axis=0) for name in ("out", "plain")]
    np.testing.assert_allclose(*sorted_vectors, atol=1e-5)


def test_other_embeddings_are_not_replaced_unasked(images, checkpoint, whole, tmp_path, capsys):
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    assert main([*words(images, tmp_path, checkpoint), "--shard_images", "4"]) == 2
    assert "made with another shard_images" in capsys.readouterr().err
    assert contents(tmp_path) == whole
    assert main([*words(images, tmp_path, checkpoint), "--shard_images", "4", "--workers", "0", "--overwrite"]) == 0
    assert len(contents(tmp_path)) == 6


def test_added_images_are_told(checkpoint, tmp_path, capsys):
    images = make_classes(tmp_path / "images", 3)
    assert embed(images, tmp_path / "out", checkpoint) == 0
    make_image("red", 9).save(images / "red" / "9.png")
    assert embed(images, tmp_path / "out", checkpoint) == 2
    assert "made with another list of images, number of images" in capsys.readouterr().err


def test_another_run_that_began_meanwhile(images, checkpoint, whole, tmp_path, monkeypatch, capsys):
    """Of another batch size: its shard is told, and stays."""
    (last := tmp_path / "another").mkdir()
    assert main([*words(images, last, checkpoint), "--batch_size", "2", "--workers", "0"]) == 0
    name, content = list(contents(last).items())[2]
    read = ImageList.read

    def read_one(self, index):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
        return read(self, index)

    monkeypatch.setattr(ImageList, "read", read_one)
    assert embed(images, tmp_path / "out", checkpoint) == 2
    assert f"{name}: these embeddings were made with another batch_size" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {name: content}


def test_a_lost_process_of_loading(images, checkpoint, whole, tmp_path, monkeypatch, capsys):
    parent, read = os.getpid(), ImageList.read

    def read_or_die(self, index):
        if index == 12 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(ImageList, "read", read_or_die)
        assert embed(images, tmp_path, checkpoint, workers=1) == 2
    assert "a process that loads images was lost" in capsys.readouterr().err
    assert embed(images, tmp_path, checkpoint, workers=1) == 0
    assert contents(tmp_path) == whole


def test_what_killed_and_damaged_runs_left(images, checkpoint, whole, tmp_path):
    """A file half written, and a damaged one of another number of shards, which only --overwrite removes."""
    for name in (f".{next(iter(whole))}.k1ll3d_x", "embeddings-00001-of-00009.parquet"):
        (tmp_path / name).write_bytes(b"half")
    assert embed(images, tmp_path, checkpoint) == 0
    assert contents(tmp_path) == whole | {"embeddings-00001-of-00009.parquet": b"half"}
    assert embed(images, tmp_path, checkpoint, "--overwrite") == 0
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--batch_size", "0"], "batch_size must be a finite number at least 1"),
        (["--shard_images", "0"], "shard_images must be a finite number at least 1"),
        (["--shard_images", "10"], "multiple of batch_size 4, so that a shard is whole batches; give 8"),
        (["--workers=-1"], "workers must be a finite number at least 0"),
    ],
)
def test_bad_settings(options, told, images, checkpoint, tmp_path, capsys):
    assert main([*words(images, tmp_path / "out", checkpoint), *options]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "no such folder or tar file"),
        (lambda path: path.mkdir(), "no images here"),
        (lambda path: path.write_text("text"), "give a folder of images"),
    ],
)
def test_bad_places(make, told, checkpoint, tmp_path, capsys):
    make(tmp_path / "images")
    assert embed(tmp_path / "images", tmp_path / "out", checkpoint) == 2
    assert told in capsys.readouterr().err


def test_results_in_a_file(images, checkpoint, tmp_path, capsys):
    (tmp_path / "out").write_text("text")
    assert embed(images, tmp_path / "out", checkpoint) == 2
    assert "out: this is a file; choose the name of a folder" in capsys.readouterr().err


def test_a_damaged_tar(checkpoint, tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    assert embed(tmp_path / "a.tar", tmp_path / "out", checkpoint) == 2
    assert "a.tar: cannot be read as a tar file" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_under_torchrun(checkpoint, tmp_path):
    """Two processes, both killed without warning, then one alone to the end."""
    images = make_classes(tmp_path / "images", 120)
    options = ["--shard_images", "16", "--batch_size", "4", "--checkpoint", str(checkpoint), "--device", "cpu"]
    line = ["-m", "overlock.cli", "embed", str(images), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *line, "--out", str(tmp_path / "whole")], env=environment, check=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, *line, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    while not list((tmp_path / "out").glob("*.parquet")):
        time.sleep(0.05)
        assert process.poll() is None
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], stdout=subprocess.PIPE, check=True)
    for own in map(int, listed.stdout.split()):  # torchrun gives each a session of its own
        os.kill(own, signal.SIGKILL)
    process.kill()
    process.wait()
    assert 0 < len(list((tmp_path / "out").glob("*.parquet"))) < 23
    subprocess.run([sys.executable, *line, "--out", str(tmp_path / "out")], env=environment, check=True)
    whole = contents(tmp_path / "whole")
    assert len(whole) == 23
    assert contents(tmp_path / "out") == whole


def test_what_a_network_gives_and_keeps(checkpoint, tmp_path):
    """The vector is what the classifier takes."""
    make_image("red", 0).save(tmp_path / "a.png")
    network = randomise(timm.create_model("overlock_atto", **ARGUMENTS))
    record = Record(model="overlock_atto", model_args=ARGUMENTS, classes=tuple("abc"), preprocessing=PREPARED)
    embedder = Embedder(network, record, device="cpu")
    vector = embedder(tmp_path / "a.png").vector
    x = embedder.transform(make_image("red", 0))[None]
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(x), pre_logits=True)[0]
        torch.testing.assert_close(network.head.fc(torch.from_numpy(vector)), network(x)[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.from_numpy(vector), expected, atol=1e-4, rtol=1e-4)
    assert embedder.dim == len(vector) == 16


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext2", "test_efficientnet"])
def test_timm_models(name):
    network = timm.create_model(name, num_classes=4).eval()
    record = Record(
        model=name, model_args=dict(num_classes=4), classes=tuple("abcd"),
        preprocessing=PREPARED | dict(input_size=(3, 160, 160)),
    )  # fmt: skip
    embedder = Embedder(network, record, device="cpu")
    found = embedder([make_image("red", 0), make_image("blue", 1)])
    assert {one.vector.shape for one in found} == {(embedder.dim,)}
    assert found[0].size == (32, 32)


@pytest.mark.parametrize("head", ["faster_rcnn", pytest.param("upernet", marks=pytest.mark.slow)])
def test_detectors_and_segmenters(head):
    """The mean of the backbone's coarsest map."""
    network = randomise(HEADS[head]("overlock_atto", num_classes=2, hidden_channels=16))
    record = Record(model="overlock_atto", head=head, classes=("a", "b"), preprocessing=dict(scale=(64, 64)))
    embedder = Embedder(network, record, device="cpu")
    x = embedder.transform(make_image("red", 0))[None]
    with torch.no_grad():
        expected = getattr(network.backbone, "body", network.backbone)(x)[-1].mean((2, 3))[0]
    vector = torch.from_numpy(embedder(make_image("red", 0)).vector)
    torch.testing.assert_close(vector, expected, atol=1e-4, rtol=1e-4)
