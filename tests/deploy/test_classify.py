"""A predictor takes images as they come and gives what the network gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import randomise
from pictures import make_image
from PIL import Image, ImageColor

from overlock.checkpoints import Record
from overlock.data import make_eval_transform
from overlock.deploy import Prediction, Predictor, models
from overlock.deploy import picture as picture_module
from overlock.deploy.picture import draw_picture, save_picture

PREPROCESSING = dict(
    input_size=(3, 32, 32), mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3), interpolation="bicubic", crop_pct=1.0
)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    network = randomise(timm.create_model("overlock_atto", num_classes=4))
    record = Record(model="overlock_atto", classes=("a", "b", "c", "d"), preprocessing=PREPROCESSING)
    return Predictor(network, record, device="cpu")


def test_gives_the_network_s_probabilities(predictor, tmp_path):
    network = randomise(timm.create_model("overlock_atto", num_classes=4))
    image = make_image("red", 1, 40)
    with torch.no_grad():
        expected = network(make_eval_transform(PREPROCESSING)(image)[None]).softmax(1)[0]
    got = predictor(image, top=4)
    order = expected.argsort(descending=True)
    assert got.labels == tuple("abcd"[i] for i in order)
    torch.testing.assert_close(torch.tensor(got.probabilities), expected[order], atol=1e-4, rtol=1e-3)


def test_every_form_of_an_image_gives_the_same(predictor, tmp_path):
    image = make_image("green", 2, 40)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [
        str(tmp_path / "a.png"), tmp_path / "a.png", image, array, array.astype(np.float64) / 255, tensor, tensor / 255,
        np.dstack([array, np.full((40, 40), 255, np.uint8)]),
    ]  # fmt: skip
    results = predictor(forms, batch_size=3)
    assert len(results) == len(forms)
    for result in results:
        assert result.probabilities == pytest.approx(results[0].probabilities, abs=1e-5)
    assert results[0].source == str(tmp_path / "a.png")
    assert predictor(image).labels == results[2].labels


def test_grey_arrays(predictor):
    grey = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    results = predictor([grey, grey[:, :, None], Image.fromarray(grey), torch.from_numpy(grey)[None]])
    assert len({result.probabilities for result in results}) == 1


def test_top_is_limited_by_the_classes(predictor):
    assert len(predictor(make_image("red", 0), top=2).labels) == 2
    result = predictor(make_image("red", 0), top=50)
    assert len(result.labels) == 4
    assert sum(result.probabilities) == pytest.approx(1)
    assert list(result.probabilities) == sorted(result.probabilities, reverse=True)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((4, 4), np.int64), "uint8 of 0 to 255 or floats of 0 to 1, got int64"),
        (np.full((4, 4), 7.0), "must lie in 0 to 1, got 7 to 7"),
        (np.full((4, 4), np.nan), "must lie in 0 to 1"),
        (np.zeros((0, 4), np.uint8), "an image array must be"),
        (torch.zeros(2, 3, 4, 4), "give a batch as a list"),
        ("nowhere.png", "nowhere.png: no such image"),
    ],
)
def test_refuses_what_is_no_image(predictor, image, message):
    with pytest.raises(ValueError, match=message):
        predictor(image)


def test_a_model_of_timm_s_by_its_name(monkeypatch):
    """As if its published weights were fetched."""
    monkeypatch.setattr(models, "build", lambda name, pretrained: timm.create_model(name))
    predictor = Predictor.from_checkpoint("test_convnext", device="cpu")
    assert predictor.record.model == "test_convnext"
    assert len(predictor(make_image("red", 0), top=2000).labels) == 1000


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("overlok_t", r"overlok_t: no such file or folder, and no model of timm's \(.*did you mean 'overlock_t'"),
        ("nowhere.pth", r"nowhere\.pth: no such file"),
        ("some/where", r"some/where: no such file"),
    ],
)
def test_checkpoints_that_are_not_there(source, told):
    with pytest.raises(ValueError, match=told):
        Predictor.from_checkpoint(source)


def test_refuses_senseless_numbers(predictor):
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        predictor([make_image("red", 0)], top=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        predictor([make_image("red", 0)], batch_size=0)
    assert predictor([]) == []


def test_picture_shows_image_and_bar(tmp_path):
    Image.new("RGB", (10, 5), (255, 0, 0)).save(tmp_path / "a.png")
    prediction = Prediction(source=str(tmp_path / "a.png"), labels=("red " * 30, "b"), probabilities=(0.75, 0.25))
    picture = draw_picture([prediction] * 5)
    width, height = picture_module.WIDTH + picture_module.GAP, picture_module.CARD + picture_module.GAP
    assert picture.size == (4 * width + picture_module.GAP, 2 * height + picture_module.GAP)
    pixels = np.asarray(picture)
    assert pixels[height // 3, width // 2].tolist() == [255, 0, 0]
    for colour, share in ((picture_module.BEST_BAR, 0.75), (picture_module.BAR, 0.25)):
        filled = int((pixels == ImageColor.getrgb(colour)).all(axis=2).sum())
        room = picture_module.WIDTH - 2 * picture_module.INSET
        assert filled == pytest.approx(5 * share * room * picture_module.BAR_HEIGHT, rel=0.02)
    save_picture(tmp_path / "out" / "p.jpg", [prediction])
    assert Image.open(tmp_path / "out" / "p.jpg").width == width + picture_module.GAP


PHOTOS = Path(__file__).resolve().parents[2] / "examples" / "photos"
SHOWN = dict(cat="cat", deer="deer", dog="dog", duck="bird", horse="horse", owl="bird")


def test_the_package_s_own_weights(default_file):
    """They know most of the photographs; with other preprocessing or other classes they would know one in ten."""
    predictor = Predictor.default(device="cpu")
    assert predictor.record.model == "overlock_atto"
    assert len(predictor.record.classes) == 10
    assert default_file.stat().st_size <= 4e6
    results = predictor([PHOTOS / f"{name}.jpg" for name in SHOWN])
    right = [result.labels[0] == shown for result, shown in zip(results, SHOWN.values(), strict=True)]
    assert sum(right) >= 4, [(Path(result.source).name, result.labels[0]) for result in results]


def test_every_photograph_is_accounted_for():
    told = (PHOTOS / "README.md").read_text()
    photos = sorted(PHOTOS.glob("*.jpg"))
    assert {photo.stem for photo in photos} == {*SHOWN, "rocket"}
    assert all(f"| `{photo.name}`" in told for photo in photos)


def test_picture_s_name_must_be_an_image_s(tmp_path):
    with pytest.raises(ValueError, match=r"end the name in \.png or \.jpg"):
        save_picture(tmp_path / "p.doc", [])
