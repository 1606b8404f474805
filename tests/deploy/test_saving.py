"""What results are saved as: each ending what people expect, or refused."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scenes import CLASSES, make_scene, write_scenes
from test_detect_segment import detector, segmenter  # noqa: F401  # fixtures

from overlock.checkpoints import MODEL_FILE
from overlock.cli import main
from overlock.deploy import Objects, writers
from overlock.deploy.coco_results import CocoFile, ImageIds
from overlock.files import Outputs


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=1, val=3)


def predict(run, *words):
    return main(["predict", *map(str, words), "--checkpoint", str(run)])


def found(source, *, class_id=0, **more):
    return Objects(
        source=source, size=(8, 8), classes=CLASSES, class_ids=(class_id,), scores=(0.5,),
        boxes=((1.0, 2.0, 5.0, 8.0),), **more,
    )  # fmt: skip


def test_json_is_what_coco_loads(detector, scenes, tmp_path, capsys):  # noqa: F811
    """With the names as ids, and with those of a file, which may be without objects."""
    truth = next(scenes.rglob("instances_val.json"))
    content = json.loads(truth.read_text())
    ids = {image["file_name"]: image["id"] for image in content["images"]}
    del content["annotations"]
    for i, category in enumerate(content["categories"]):
        category["id"] = 70 + i
    (tmp_path / "info.json").write_text(json.dumps(content))
    words = (scenes / "val", "--threshold", "0.05", "--json")
    assert predict(detector, *words, "--save", tmp_path / "a.json") == 0
    printed = json.loads(capsys.readouterr().out)
    results = json.loads((tmp_path / "a.json").read_text())
    assert len(results) == sum(len(row["objects"]) for row in printed) > 0
    assert {entry["image_id"] for entry in results} <= {0, 1, 2}
    words = (*words, "--save", tmp_path / "b.json", "--annotations")
    assert predict(detector, *words, tmp_path / "info.json") == 0
    by_id = json.loads((tmp_path / "b.json").read_text())
    assert {entry["image_id"] for entry in by_id} <= set(ids.values())
    assert [entry["bbox"] for entry in by_id] == [entry["bbox"] for entry in results]
    assert [entry["category_id"] - 69 for entry in by_id] == [entry["category_id"] for entry in results]
    assert predict(detector, *words, truth, "--overwrite") == 0
    loaded = COCO(str(truth)).loadRes(str(tmp_path / "b.json"))
    assert len(loaded.anns) == len(results)


def test_ids_of_images(tmp_path, caplog):
    images = [dict(id=7, file_name="a/x.jpg"), dict(id=8, file_name="b/x.jpg"), dict(id="n", file_name="y.jpg")]
    (tmp_path / "info.json").write_text(json.dumps(dict(images=images, categories=[dict(id=3, name=CLASSES[0])])))
    ids = ImageIds(tmp_path / "info.json")
    assert [ids.of_image(f"/data/{name}") for name in ("a/x.jpg", "b/x.jpg", "c/y.jpg", "x.jpg")] == [7, 8, "n", None]
    file = CocoFile(tmp_path / "r.json", CLASSES, ids)
    with caplog.at_level(logging.WARNING):
        for source in ("y.jpg", "z.jpg", "a/x.jpg"):
            file.add(found(source, class_id=int(source == "y.jpg")))
        file.close()
    assert [entry["image_id"] for entry in json.loads((tmp_path / "r.json").read_text())] == [7]
    assert "1 images that are not in the file" in caplog.text
    assert f"1 objects of the class {CLASSES[1]}" in caplog.text
    with pytest.raises(ValueError, match="is a class of the detector"):
        ids.of_classes(["other"])
    (tmp_path / "bad.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"bad\.json: not a file of images in COCO's form"):
        ImageIds(tmp_path / "bad.json")


def test_images_of_one_id_are_refused(tmp_path):
    file = CocoFile(tmp_path / "r.json", CLASSES)
    file.add(found("a/000001.jpg"))
    with pytest.raises(ValueError, match="another image has its id 1"):
        file.add(found("b/1.jpg"))
    file.close()
    assert json.loads((tmp_path / "r.json").read_text())[0] == dict(
        image_id=1, category_id=1, bbox=[1, 2, 4, 6], score=0.5
    )


def test_a_picture_of_one_image_is_its_drawing(detector, segmenter, scenes, tmp_path):  # noqa: F811
    for name, run in (("d", detector), ("s", segmenter)):
        assert predict(run, scenes / "val" / "0.png", "--save", tmp_path / f"{name}.JPG") == 0
        assert predict(run, scenes / "val", "--save", tmp_path / f"{name}.png") == 0
    with Image.open(tmp_path / "d.JPG") as one, Image.open(tmp_path / "d.png") as several:
        assert (one.format, one.size, several.format) == ("JPEG", (64, 64), "PNG")
        assert several.width > 3 * 272
    with Image.open(tmp_path / "s.JPG") as one:
        assert one.height >= 64 < one.width  # with its legend


@pytest.mark.parametrize(
    ("task", "name", "told"),
    [
        (
            "detect",
            "r.xml",
            "results of the task detect are saved as .csv or .jsonl or .parquet (a table), .json (COCO's",
        ),
        ("detect", "found.v2", "or name a folder, without an ending or with a slash behind it"),
        ("segment", "r.txt", ".json (what --json prints), .png or .jpg (a picture) or .mp4 (a video of the drawn"),
        ("classify", "r.mp4", "results of the task classify are saved as"),
        ("classify", "folder", "results of the task classify are saved as"),
    ],
)
def test_other_endings_are_refused(tmp_path, task, name, told):
    saving = writers.Saving(task=task, classes=CLASSES, outputs=Outputs())
    with pytest.raises(ValueError) as caught:
        writers.open_writer(str(tmp_path / name), saving)
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_by_its_slash(detector, scenes, tmp_path):  # noqa: F811
    assert predict(detector, scenes / "val" / "0.png", "--save", f"{tmp_path}/found.v2/") == 0
    assert {path.name for path in (tmp_path / "found.v2").iterdir()} == {"0.png", "objects.json"}


def test_json_of_other_tasks_is_what_is_printed(segmenter, scenes, tmp_path, capsys):  # noqa: F811
    assert predict(segmenter, scenes / "val", "--json", "--save", tmp_path / "r.json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "r.json").read_text())


def test_a_picture_says_what_it_leaves_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(writers, "PICTURED", 2)
    file = writers.PictureFile(tmp_path / "p.png", Outputs())
    with caplog.at_level(logging.WARNING):
        for i in range(3):
            file.add(found(f"{i}.png", image=Image.new("RGB", (8, 8))))
        file.close()
    assert "shows the first 2 images, 1 more are not on it" in caplog.text


def write_video(path, *, frames=6, size=(64, 48), turned=False):
    """A video whose upper half is red; if turned, marked to be shown a quarter turn clockwise, as telephones do."""
    av = pytest.importorskip("av")
    picture = Image.new("RGB", size, "blue")
    picture.paste("red", (0, 0, size[0], size[1] // 2))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    if turned:  # the matrix of a track's header: a, b, u, c, d, v, x, y, w
        content = path.read_bytes()
        start = content.index(b"tkhd") + 4 + 40
        one = (1 << 16).to_bytes(4, "big")
        matrix = (
            bytes(4)
            + one
            + bytes(4)
            + (-(1 << 16)).to_bytes(4, "big", signed=True)
            + bytes(16)
            + (1 << 30).to_bytes(4, "big")
        )
        path.write_bytes(content[:start] + matrix + content[start + 36 :])
    return path


def test_the_drawn_frames_of_a_video(detector, segmenter, tmp_path):  # noqa: F811
    av = pytest.importorskip("av")
    video = write_video(tmp_path / "v.mp4")
    for name, run in (("d", detector), ("s", segmenter)):
        saved = tmp_path / f"{name}.mp4"
        assert predict(run, video, "--every", "2", "--save", saved, "--save", tmp_path / f"{name}.csv") == 0
        with av.open(str(saved)) as container:
            assert container.streams.video[0].average_rate == 5
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert [frame.shape for frame in frames] == [(48, 64, 3)] * 3
        rows = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
        assert {row["frame"] for row in rows} == {"0", "2", "4"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.csv", "d.mp4", "s.csv", "s.mp4", "v.mp4"]
    assert predict(detector, video, "--save", video, "--overwrite") == 2


def test_frames_are_upright(tmp_path):
    from overlock.deploy.videos import read_frames

    (_, flat), *_ = read_frames(write_video(tmp_path / "a.mp4"))
    (_, turned), *others = read_frames(write_video(tmp_path / "b.mp4", turned=True), every=3)
    assert flat.size == turned.size[::-1] == (64, 48)
    assert [number for number, _ in others] == [3]
    expected = np.asarray(flat.transpose(Image.Transpose.ROTATE_270), dtype=int)  # clockwise
    assert np.abs(np.asarray(turned, dtype=int) - expected).mean() < 2
    red, blue = turned.getpixel((44, 30)), turned.getpixel((4, 30))
    assert red[0] > 200 > red[2]
    assert blue[2] > 200 > blue[0]


@pytest.mark.parametrize("frames", [0, -1])
def test_a_video_without_frames_is_told(detector, tmp_path, frames, capsys):  # noqa: F811
    """None at all, or sound alone."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        if frames < 0:
            stream = container.add_stream("pcm_s16le", rate=8000)
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
            samples.sample_rate = 8000
            container.mux(stream.encode(samples))
        else:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            container.start_encoding()
        container.mux(stream.encode())
    assert predict(detector, tmp_path / "v.mkv") == 2
    assert "skipped " in capsys.readouterr().err


def test_images_of_several_sizes_in_a_video(tmp_path, caplog):
    pytest.importorskip("av")
    saving = writers.Saving(task="detect", classes=CLASSES, outputs=Outputs())
    writer = writers.open_writer(str(tmp_path / "v.mp4"), saving)
    with caplog.at_level(logging.WARNING):
        for size in ((33, 21), (33, 21), (20, 40)):
            writer.add(found("a.png", image=Image.new("RGB", size)))
        writer.close()
    assert "1 frames of another size are fitted into that of the first, 33 x 21" in caplog.text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--top", "3"), "--top is for classifiers; a detector takes --threshold, --max_detections, --nms_iou and"),
        (("--window", "64"), "--window is for segmenters; a detector takes"),
        (("--flip",), "--flip is for segmenters"),
        (("--batch_size", "0"), "batch_size must be at least 1, got 0"),
        (("--every", "2"), "--every 2 is for videos, and none is among the images"),
        (("--annotations", "a.json"), "--annotations says the ids that --save FILE.json takes"),
    ],
)
def test_options_that_do_not_fit_are_refused(detector, scenes, capsys, words, told):  # noqa: F811
    assert predict(detector, scenes / "val", *words) == 2
    assert told in capsys.readouterr().err


def test_options_of_detectors_are_not_a_segmenter_s(segmenter, scenes, tmp_path, capsys):  # noqa: F811
    assert predict(segmenter, scenes / "val", "--threshold", "0") == 2
    assert "--threshold is for detectors; a segmenter takes --scales, --flip, --window and --stride" in (
        capsys.readouterr().err
    )
    shutil.copy(segmenter / MODEL_FILE, tmp_path / "m.safetensors")
    assert main(["predict", str(make(tmp_path)), "--threshold", "0.5"]) == 2
    assert "--threshold is for detectors; a classifier takes --top" in capsys.readouterr().err


def make(folder):
    make_scene(0)[0].save(folder / "a.png")
    return folder / "a.png"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["r.csv", "r.jsonl", "r.json", "v.mp4"])
def test_a_full_disk_is_one_sentence(detector, scenes, tmp_path, capsys, name):  # noqa: F811
    link = tmp_path / ("." + "v.partial.mp4" if name == "v.mp4" else name)
    link.symlink_to("/dev/full")
    assert predict(detector, scenes / "val", "--threshold", "0", "--save", tmp_path / name, "--overwrite") == 2
    err = capsys.readouterr().err.strip()  # earlier versions of rich end a progress bar with an empty line
    assert err.count("error: ") == 1
    assert "\n" not in err
    assert f"{link}: cannot write here (No space left on device)" in err


def test_one_folder_is_taken_once(detector, scenes, tmp_path, capsys):  # noqa: F811
    out = ("--save", tmp_path / "out", "--save", f"{tmp_path}/./out/")
    assert predict(detector, scenes / "val", *out) == 2
    assert "this command writes into it already" in capsys.readouterr().err


def test_sigterm_leaves_whole_files(detector, scenes, tmp_path):  # noqa: F811
    """As a scheduler sends it, in the midst of an endless list."""
    saved = [tmp_path / name for name in ("r.csv", "r.json")]
    words = ["predict", "-", "--checkpoint", str(detector), "--batch_size", "1", "--workers", "0"]
    words += [word for path in saved for word in ("--save", str(path))]
    command = [sys.executable, "-u", "-m", "overlock.cli", *words, "--save", str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for i in range(2):
            process.stdin.write(f"{scenes / 'val' / f'{i}.png'}\n")
            process.stdin.flush()
        while not (tmp_path / "out" / "1.png").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        table = process.stdout.read()
    assert process.returncode == 143
    assert "0.png" in table
    assert isinstance(json.loads(saved[1].read_text()), list)
    assert {Path(row["source"]).name for row in csv.DictReader(saved[0].open())} == {"0.png", "1.png"}
    assert len(json.loads((tmp_path / "out" / "objects.json").read_text())["images"]) == 2
