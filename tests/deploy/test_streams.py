"""Prediction of many images: sources of every kind, failures, tables written as they come, and what may be written."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from helpers import randomise
from pictures import make_image
from PIL import Image
from scenes import CLASSES

from overlock.checkpoints import MODEL_FILE, Record, save_model
from overlock.cli import main
from overlock.deploy import Detector, Failure, Item, Predictor, Segmenter
from overlock.files import Outputs

PHOTO = Path(__file__).resolve().parents[2] / "examples" / "photos" / "cat.jpg"
PREPROCESSING = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    record = Record(
        model="overlock_atto", model_args=dict(num_classes=2), classes=("a", "b"), preprocessing=PREPROCESSING
    )
    save_model(folder / MODEL_FILE, randomise(timm.create_model("overlock_atto", num_classes=2)).state_dict(), record)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Three images, one of them in a folder below, and two files that are none."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for name in ("x", "y", "below/z"):
        make_image("red", 0).save(folder / f"{name}.png")
    (folder / "bad.jpg").write_bytes(b"no image")
    (folder / "cut.png").write_bytes((folder / "x.png").read_bytes()[:60])
    return folder


def predict(run, *words):
    return main(["predict", *map(str, words), "--checkpoint", str(run)])


def save_head(folder, head, classes, **more):
    record = Record(model="overlock_atto", head=head, classes=classes, **more)
    save_model(folder / MODEL_FILE, record.make_network().eval().state_dict(), record)
    return folder


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter")
    arguments = dict(hidden_channels=32)
    return save_head(folder, "upernet", ("g", *CLASSES), model_args=arguments, preprocessing=dict(scale=(64, 64)))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    return save_head(folder, "mask_rcnn", CLASSES, model_args=dict(min_size=64, max_size=96, proposals=20))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_bad_files_are_rows(run, photos, tmp_path, suffix, capsys):
    table = tmp_path / f"rows.{suffix}"
    assert predict(run, photos, "--top", "1", "--save", table) == 1
    if suffix == "csv":
        rows = list(csv.DictReader(table.open()))
    elif suffix == "jsonl":
        rows = [json.loads(line) for line in table.open()]
    else:
        rows = pytest.importorskip("pyarrow.parquet").read_table(table).to_pylist()
    told = {row["source"].removeprefix(f"{photos}/"): row.get("error") for row in rows}
    assert list(told) == ["bad.jpg", "below/z.png", "cut.png", "x.png", "y.png"]
    assert [bool(told[name]) for name in told] == [True, False, True, False, False]
    assert "not an image" in told["bad.jpg"]
    err = capsys.readouterr().err
    assert "2 of 5 images skipped" in err
    assert f"skipped {photos}/cut.png: the image is damaged" in err


def test_exit_codes(run, photos, capsys):
    assert predict(run, photos / "x.png") == 0
    assert predict(run, photos / "bad.jpg") == 2
    capsys.readouterr()
    assert predict(run, photos, "--strict", "--json") == 2
    assert [row["source"] for row in json.loads(capsys.readouterr().out)] == [str(photos / "bad.jpg")]


def standard_input(content):
    return io.TextIOWrapper(io.BytesIO(content))


def test_sources(run, photos, tmp_path, monkeypatch, capsys):
    def sources(*words):
        capsys.readouterr()
        assert predict(run, *words, "--json") == 0
        return [row["source"].removeprefix(f"{photos}/") for row in json.loads(capsys.readouterr().out)]

    assert sources(f"{photos}/**/[xz].png") == ["below/z.png", "x.png"]
    (photos / "list.txt").write_text("y.png\n\nbelow/z.png\n")
    assert sources(photos / "list.txt") == ["y.png", "below/z.png"]
    monkeypatch.setattr("sys.stdin", standard_input(f"{photos}/x.png\n".encode()))
    assert sources("-") == ["x.png"]
    assert predict(run, f"{photos}/*.tif") == 2
    assert "no file fits this pattern" in capsys.readouterr().err


def test_what_is_not_taken_is_said_with_its_mend(run, tmp_path, capsys):
    assert predict(run, "https://example.org/a.jpg?size=3") == 2
    assert "addresses are not fetched; download the file" in capsys.readouterr().err
    (tmp_path / "a.MP4").touch()
    assert predict(run, tmp_path) == 2
    assert "no images but videos in this folder; name the videos themselves" in capsys.readouterr().err


def test_a_stream_yields_failures_and_goes_on(run, photos):
    predictor = Predictor.from_checkpoint(run, device="cpu")
    array = np.asarray(make_image("red", 0))
    outcomes = list(predictor.stream([photos / "x.png", "nowhere.png", array, photos / "bad.jpg"], batch_size=2))
    assert [type(one) is Failure for one in outcomes] == [False, True, False, True]
    assert outcomes[1].sentence.startswith("nowhere.png: no such image")
    assert outcomes[0].probabilities == pytest.approx(outcomes[2].probabilities, abs=1e-5)
    assert outcomes[2].picture().size == make_image("red", 0).size
    with pytest.raises(ValueError, match="a stream takes many images"):
        predictor.stream(photos / "x.png")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_finite(run, photos, precision):
    result = Predictor.from_checkpoint(run, device="cpu", precision=precision)(photos / "x.png")
    assert sum(result.probabilities) == pytest.approx(1, abs=0.02)


def test_devices(run, photos, capsys):
    assert predict(run, photos / "x.png", "--device", "cpu", "--precision", "bf16") == 0
    assert predict(run, photos / "x.png", "--device", "gpu0") == 2
    assert "device 'gpu0' cannot be used" in capsys.readouterr().err


def test_a_single_image_is_a_single_result(detector, segmenter, photos):
    assert Detector.from_checkpoint(detector)(photos / "x.png", threshold=0).source == str(photos / "x.png")
    result = Segmenter.from_checkpoint(segmenter)(np.asarray(make_image("red", 0)))
    assert result.draw(legend=False).size == make_image("red", 0).size


def test_a_threshold_below_the_detectors_own(detector, photos):
    predictor = Detector.from_checkpoint(detector)
    counts = [len(predictor(photos / "x.png", threshold=share).scores) for share in (0, 0.05)]
    assert counts[0] >= counts[1]
    assert counts[0] > 0
    assert len(predictor(photos / "x.png", threshold=0, max_detections=3).scores) <= 3


@pytest.mark.parametrize("size", [(2000, 5), (5, 2000), (1, 1)])
def test_strips(run, detector, segmenter, size):
    image = Image.new("RGB", size, "red")
    assert len(Predictor.from_checkpoint(run, device="cpu")(image).labels) == 2
    assert Segmenter.from_checkpoint(segmenter, device="cpu")(image).labels.shape == size[::-1]
    assert Detector.from_checkpoint(detector, device="cpu")(image).size == size[::-1]


def test_no_input_is_written_over(run, segmenter, tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    for name in ("x", "x_labels"):
        make_image("red", 0).save(own / f"{name}.png")
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    assert predict(segmenter, own, "--save", own) == 2
    assert "this command reads the files of this folder" in capsys.readouterr().err
    assert predict(run, own / "x.png", "--save", own / "x.png") == 2
    assert "this command reads it" in capsys.readouterr().err
    assert predict(run, own / "x.png", "--save", own / "x_labels.png") == 2
    assert "pass --overwrite" in capsys.readouterr().err
    (tmp_path / "rows.csv").write_text("notes")
    assert predict(run, own / "x.png", "--save", tmp_path / "rows.csv") == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "rows.csv").read_text() == "notes"
    for _ in range(2):
        assert predict(run, own / "x.png", "--save", tmp_path / "rows.csv", "--overwrite") == 0
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    out = tmp_path / "out"
    assert predict(segmenter, own, "--save", out) == 0
    assert len(list(out.iterdir())) == 4  # a picture and a map of each
    assert predict(segmenter, own, "--save", out) == 2
    assert "not empty" in capsys.readouterr().err
    assert predict(segmenter, own, "--save", out, "--overwrite") == 0


def test_a_table_may_lie_beside_the_images(run, photos, capsys):
    """As it is none of them; a picture there is one the next time."""
    (photos / "bad.jpg").unlink()
    (photos / "cut.png").unlink()
    for _ in range(2):
        assert predict(run, photos, "--save", photos / "rows.CSV", "--overwrite") == 0
    assert predict(run, photos, "--save", photos / "all.PNG", "--overwrite") == 0
    assert predict(run, photos, "--save", photos / "all.PNG", "--overwrite") == 2
    assert "this command reads it" in capsys.readouterr().err


def test_what_links_in_a_folder_lead_to_is_not_written_over(run, tmp_path, capsys):
    for name in ("store/below/a.png", "store/b.png", "photos/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make_image("red", 0).save(tmp_path / name)
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "store" / "below")
    (tmp_path / "photos" / "b.png").symlink_to(tmp_path / "store" / "b.png")
    for name in ("store/below/a.png", "store/b.png", "photos/linked/a.png", "photos/b.png", "photos/c.png"):
        assert predict(run, tmp_path / "photos", "--save", tmp_path / name, "--overwrite") == 2
        assert f"{name}: this command reads it" in capsys.readouterr().err


def test_outputs_know_links_and_letters(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    outputs = Outputs([tmp_path / "a.png"])
    assert outputs.objection(tmp_path / "link.png")
    assert outputs.claim(tmp_path / "b.png") == tmp_path / "b.png"
    with pytest.raises(ValueError, match="has written it already"):
        outputs.claim(tmp_path / "b.png")


def test_videos(run, tmp_path, capsys):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(6):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (40 * shade, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert predict(run, tmp_path / "v.mp4", "--every", "2", "--save", tmp_path / "v.csv") == 0
    rows = list(csv.DictReader((tmp_path / "v.csv").open()))
    assert [row["frame"] for row in rows if row["rank"] == "1"] == ["0", "2", "4"]
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    assert predict(run, tmp_path / "bad.mp4") == 2
    assert "the video is damaged" in capsys.readouterr().err


def test_the_limit_of_pixels(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    make_image("red", 0).save(tmp_path / "x.png")
    assert predict(run, tmp_path / "x.png", "--max_pixels", "100") == 2
    assert "more pixels than the limit of 100" in capsys.readouterr().err
    assert predict(run, tmp_path / "x.png", "--max_pixels", "100000") == 0
    assert predict(run, tmp_path / "x.png", "--max_pixels", "0") == 2


def test_odd_names(run, detector, segmenter, tmp_path, capsys):
    """Of files: with a new line, brackets and bytes that are not UTF-8; and none at all."""
    names = [b"two\nlines #1 [x].png", b"caf\xe9.png"]
    for name in names:
        shutil.copyfile(PHOTO, tmp_path / os.fsdecode(name))
    for network in (run, detector, segmenter):
        out = tmp_path.with_name(f"{tmp_path.name}_{network.name}")
        saved = [word for end in ("csv", "json", "png", "jsonl") for word in ("--save", out / f"r.{end}")]
        assert predict(network, tmp_path, *saved) == 0
        sources = {json.loads(line)["source"] for line in (out / "r.jsonl").open()}
        assert sources == {f"{tmp_path}/two\nlines #1 [x].png", f"{tmp_path}/caf\ufffd.png"}
    capsys.readouterr()
    assert predict(run, "") == predict(run, PHOTO, "--save", "") == 2
    assert capsys.readouterr().err.count("an empty word names no") == 2


def test_items_keep_their_names(run, photos):
    item = Item(image=photos / "x.png", source="camera 1", name="first")
    (result,) = Predictor.from_checkpoint(run, device="cpu").stream([item])
    assert (result.source, result.name) == ("camera 1", "first")


MEMORY = """
import resource, sys
from overlock.cli import main
code = main(["predict", sys.argv[1], "--checkpoint", sys.argv[2], "--save", sys.argv[3], "--top", "1"])
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""


@pytest.mark.slow
def test_memory_of_a_long_folder(run, tmp_path):
    """20 000 images, 50 of them bad, within 200 MB of 100 images."""
    peaks = []
    for count, bad in ((100, 1), (20_000, 50)):
        folder = tmp_path / str(count)
        folder.mkdir()
        good = io.BytesIO()
        make_image("red", 0).save(good, format="PNG")
        for i in range(count):
            (folder / f"{i:05d}.png").write_bytes(b"bad" if i % (count // bad) == 7 else good.getvalue())
        words = [sys.executable, "-c", MEMORY, str(folder), str(run), str(tmp_path / f"{count}.csv")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        code, peak = map(int, done.stderr.splitlines()[-1].split())
        assert code == 1
        rows = list(csv.DictReader((tmp_path / f"{count}.csv").open()))
        assert (len(rows), sum(bool(row["error"]) for row in rows)) == (count, bad)
        peaks.append(peak)
    print(f"peak memory: {peaks[0]} and {peaks[1]} MB")  # noqa: T201
    assert peaks[1] - peaks[0] < 200
