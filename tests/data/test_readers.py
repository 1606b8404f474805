"""Every form of data gives the same images and labels."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from pictures import COLOURS, make_classes, make_image

from overlock.data import load_data, load_test_data
from overlock.data.datasets import StreamDataset
from overlock.data.shards import pack


def colours_agree(data) -> bool:
    """Each image is of the colour that its label names."""
    for part in (data.train, data.test):
        for place in range(len(part)):
            image, label = part.read(place)
            mean = np.asarray(image).reshape(-1, 3).mean(0)
            nearest = min(COLOURS, key=lambda name: np.abs(mean - np.array(COLOURS[name])).sum())
            if data.classes[label] != nearest:
                return False
    return len(data.train) > 0


def test_a_tar_of_classes(tmp_path):
    root = make_classes(tmp_path / "data", 5)
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(root, arcname=".")
    data = load_data(str(tmp_path / "all.tar"))
    assert (len(data.train), len(data.test), data.classes) == (12, 3, tuple(COLOURS))
    assert colours_agree(data)


def test_tars_by_class_and_part(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        root = make_classes(tmp_path / part, count)
        for folder in sorted(root.iterdir()):
            path = tmp_path / "tars" / part / f"{folder.name}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w") as archive:
                for file in folder.iterdir():
                    archive.add(file, arcname=file.name)
    data = load_data(str(tmp_path / "tars"))
    assert (len(data.train), len(data.test), data.classes) == (12, 6, tuple(COLOURS))
    assert colours_agree(data)
    alone = load_test_data(str(tmp_path / "tars" / "val"))
    assert len(alone.test) == 6


def write_tars(root, **parts):
    """PART/CLASS.tar: ``val=("red",)`` has two images of that class."""
    for part, colours in parts.items():
        for folder in sorted(make_classes(root / "files" / part, 2, colours=colours).iterdir()):
            path = root / "tars" / part / f"{folder.name}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w") as archive:
                for file in folder.iterdir():
                    archive.add(file, arcname=file.name)
    return root / "tars"


@pytest.mark.parametrize("present", [("red",), ("green", "red")])
@pytest.mark.parametrize("form", ["a tar a class", "one tar"])
def test_a_test_part_of_tars_with_fewer_classes(form, present, tmp_path):
    root = write_tars(tmp_path, train=tuple(COLOURS), val=present)
    if form == "one tar":
        root = tmp_path / "all.tar"
        with tarfile.open(root, "w") as archive:
            archive.add(tmp_path / "files", arcname="data")
    data = load_data(str(root))
    assert (len(data.train), len(data.test), data.classes) == (6, 2 * len(present), tuple(COLOURS))
    assert colours_agree(data)
    assert {data.classes[data.test.read(i)[1]] for i in range(len(data.test))} == {*present}
    (note,) = data.notes
    assert f"no images of {3 - len(present)} of the classes to test on (blue" in note


@pytest.mark.parametrize("form", ["a tar a class", "one tar"])
def test_a_test_part_of_tars_with_other_classes(form, tmp_path):
    root = write_tars(tmp_path, train=("blue", "red"), val=("green", "red"))
    if form == "one tar":
        root = tmp_path / "all.tar"
        with tarfile.open(root, "w") as archive:
            archive.add(tmp_path / "files", arcname="data")
    with pytest.raises(ValueError, match=r"class 'green' of '.*' is not among those to train on"):
        load_data(str(root))


def test_tars_without_a_test_part(tmp_path):
    data = load_data(str(write_tars(tmp_path, train=tuple(COLOURS))))
    assert (len(data.train), len(data.test)) == (3, 3)
    assert colours_agree(data)
    assert data.notes[0].endswith("train: there is no part to test on, so 3 of the 6 images are held out")


def test_a_tar_with_what_systems_leave_and_other_endings(tmp_path):
    root = make_classes(tmp_path / "data", 5)
    make_image("red", 77).save(root / "red" / "more.BMP")
    (root / "red" / "phone.heic").write_bytes(b"x")
    for name in ("__MACOSX/red/._0.png", "__MACOSX/grey/._0.png", "red/._0.png", "blue/@eaDir/0.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image")
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(root, arcname="data")
    data = load_data(str(tmp_path / "all.tar"))
    assert (len(data.train) + len(data.test), data.classes) == (16, tuple(COLOURS))
    assert colours_agree(data)
    (note,) = data.notes
    assert note.endswith(
        "all.tar: 1 file is no image that can be read and left out (1 .heic); convert HEIC to JPEG or PNG"
    )
    with pytest.raises(ValueError, match=r"all\.tar: classes is .* leave it out"):
        load_data(str(tmp_path / "all.tar"), classes="names.txt")


def test_a_tar_with_parts(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        make_classes(tmp_path / "data" / part, count)
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(tmp_path / "data", arcname="data")
    data = load_data(str(tmp_path / "all.tar"))
    assert (len(data.train), len(data.test), data.classes) == (12, 6, tuple(COLOURS))
    assert {data.test.reader.filename(int(place)).split("/")[1] for place in data.test.places} == {"val"}


def test_labels_of_packed_images_that_cannot_be(tmp_path):
    content = np.zeros(8, np.uint8)
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", jpeg=content, offsets=[0, 4, 8], labels=[0, 1])
    (tmp_path / "classes.txt").write_text("a\nb")
    assert len(load_data(str(tmp_path)).train) == 2
    np.savez(tmp_path / "test.npz", jpeg=content, offsets=[0, 4, 8], labels=[0, 2])
    with pytest.raises(ValueError, match=r"test\.npz: labels from 0 to 2, where classes\.txt has 2 names"):
        load_data(str(tmp_path))
    np.savez(tmp_path / "test.npz", jpeg=content, offsets=[0, 4, 9], labels=[0, 1])
    with pytest.raises(ValueError, match=r"test\.npz: the offsets do not rise"):
        load_data(str(tmp_path))
    np.savez(tmp_path / "test.npz", jpeg=content, offsets=[0, 4], labels=[0, 1])
    with pytest.raises(ValueError, match=r"test\.npz: 2 labels need 3 offsets"):
        load_data(str(tmp_path))


def test_packed_images(tmp_path):
    for part, count in (("train", 4), ("test", 2)):
        parts, labels = [], []
        for label, colour in enumerate(COLOURS):
            for seed in range(count):
                buffer = io.BytesIO()
                make_image(colour, seed).save(buffer, format="JPEG")
                parts.append(np.frombuffer(buffer.getvalue(), np.uint8))
                labels.append(label)
        offsets = np.cumsum([0, *map(len, parts)])
        np.savez(tmp_path / f"{part}.npz", jpeg=np.concatenate(parts), offsets=offsets, labels=np.uint8(labels))
    with pytest.raises(ValueError, match=r"train\.npz, test\.npz and classes\.txt are needed"):
        load_data(str(tmp_path))
    (tmp_path / "classes.txt").write_text("\n".join(COLOURS))
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.test), data.crop_pct) == (12, 6, 1.0)
    assert colours_agree(data)
    (tmp_path / "test.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test\.npz: not a readable file of packed images"):
        load_data(str(tmp_path))


def test_a_folder_as_a_hugging_face_data_set(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    make_classes(tmp_path / "data" / "train", 4)
    make_classes(tmp_path / "data" / "test", 2)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = load_data(f"hfds:{tmp_path / 'data'}")
    assert (len(data.train), len(data.test), data.classes) == (12, 6, tuple(COLOURS))
    assert colours_agree(data)
    streamed = load_data(f"hfids:{tmp_path / 'data'}")
    assert (len(streamed.train), len(streamed.test), streamed.classes) == (12, 6, tuple(COLOURS))
    images = list(streamed.test.make_reader(training=False, batch_size=1, seed=0))
    assert [label for _, label in images] == [0, 0, 1, 1, 2, 2]


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads addresses with curl")
def test_shards_at_an_address(tmp_path):
    pytest.importorskip("webdataset")
    pack(make_classes(tmp_path / "data", 5), tmp_path / "shards", shard_images=8)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "shards"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        data = load_data(
            f"wds:http://127.0.0.1:{server.server_port}", train_split="train-{00000..00001}.tar|12",
            val_split="validation-00000.tar|3", classes=str(tmp_path / "shards" / "classes.txt"),
        )  # fmt: skip
        parts = [list(part.make_reader(training=False, batch_size=1, seed=0)) for part in (data.train, data.test)]
        server.shutdown()
    assert [len(part) for part in parts] == [12, 3]
    assert sorted(label for _, label in parts[0]) == [0] * 4 + [1] * 4 + [2] * 4


def test_labels_of_shards_that_no_class_has(tmp_path):
    pytest.importorskip("webdataset")
    pack(make_classes(tmp_path / "data", 5), tmp_path / "shards")
    (tmp_path / "shards" / "classes.txt").write_text("a\nb\n")
    part = load_data(f"wds:{tmp_path / 'shards'}").test
    stream = StreamDataset(part, lambda image, label: (image, label), seed=0, batch_size=1, training=False)
    samples = list(stream)
    assert [sample.content is None for sample in samples].count(True) == 1
    (problem,) = (problem for sample in samples for problem in sample.unreadable)
    assert "its label is 2, where 2 classes go from 0 on" in problem


def test_shards_that_will_not_do(tmp_path):
    pytest.importorskip("webdataset")
    with pytest.raises(ValueError, match="no such folder"):
        load_data(f"wds:{tmp_path / 'nowhere'}")
    pack(make_classes(tmp_path / "data", 5), tmp_path / "shards")
    (tmp_path / "shards" / "_info.json").rename(tmp_path / "info.json")
    with pytest.raises(ValueError, match=r"name the shards with train_split and val_split, such as 'train-\{0000"):
        load_data(f"wds:{tmp_path / 'shards'}")
    with pytest.raises(ValueError, match=r"must end in \|N, its number of images"):
        load_data(f"wds:{tmp_path / 'shards'}", train_split="train-00000.tar", val_split="validation-00000.tar|3")
    data = load_data(f"wds:{tmp_path / 'shards'}", train_split="train-00000.tar|12", val_split="validation-00000.tar|3")
    assert (len(data.train), len(data.test)) == (12, 3)
    (tmp_path / "shards" / "classes.txt").unlink()
    (tmp_path / "info.json").rename(tmp_path / "shards" / "_info.json")
    with pytest.raises(ValueError, match="give a file with the names of the classes"):
        load_data(f"wds:{tmp_path / 'shards'}")
    assert json.loads((tmp_path / "shards" / "_info.json").read_text())["splits"]["train"]["num_samples"] == 12
