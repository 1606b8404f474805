"""What goes to the hub is what timm loads."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from helpers import randomise
from pictures import COLOURS

from overlock.checkpoints import (
    CARD_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    Record,
    find_weights,
    load_classifier,
    push,
    save_model,
    to_timm_config,
    write_card,
)
from overlock.deploy import Detector

PREPROCESSING = dict(
    input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic", crop_pct=1.0
)  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    network = randomise(timm.create_model("overlock_atto", num_classes=3))
    record = Record(
        model="overlock_atto", model_args={"num_classes": 3}, classes=tuple(COLOURS), preprocessing=PREPROCESSING
    )
    save_model(tmp_path / "run" / MODEL_FILE, network.state_dict(), record)
    (tmp_path / "run" / CONFIG_FILE).write_text(to_timm_config(record))
    write_card(
        tmp_path / "run" / CARD_FILE, record, settings=dict(epochs=3), measures={"accuracy": 0.5}, data="a/photos"
    )
    return tmp_path / "run"


class Hub:
    """Takes files into a folder."""

    def __init__(self, root: Path):
        self.root = root

    def __call__(self) -> Hub:
        return self

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
        (self.root / name).mkdir(parents=True)
        return f"https://hub/{name}"

    def repo_info(self, name: str):
        return SimpleNamespace(private=False)

    def create_branch(self, name: str, *, branch: str, exist_ok: bool) -> None:
        (self.root / f"{name}@{branch}").mkdir(exist_ok=exist_ok)

    def upload_file(self, *, path_or_fileobj, path_in_repo: str, repo_id: str, revision: str | None) -> None:
        target = self.root / (repo_id if revision is None else f"{repo_id}@{revision}") / path_in_repo
        if isinstance(path_or_fileobj, bytes):
            target.write_bytes(path_or_fileobj)
        else:
            shutil.copy(path_or_fileobj, target)


def test_what_is_pushed_is_loaded_by_timm(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(tmp_path / "hub"))
    assert push(folder, "me/colours") == "https://hub/me/colours"
    there = tmp_path / "hub" / "me" / "colours"
    assert sorted(path.name for path in there.iterdir()) == [CARD_FILE, CONFIG_FILE, MODEL_FILE]
    assert 'timm.create_model("hf-hub:me/colours", pretrained=True)' in (there / CARD_FILE).read_text()
    theirs = timm.create_model(f"local-dir:{there}", pretrained=True).eval()
    ours, _ = load_classifier(folder)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x))


def test_a_revision_is_pushed_to_its_branch(folder, tmp_path, monkeypatch):
    """Made where need be, a second time too; the card's lines ask for it."""
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(tmp_path / "hub"))
    push(folder, "me/colours", revision="v2")
    there = tmp_path / "hub" / "me"
    assert not any((there / "colours").iterdir())
    assert sorted(path.name for path in (there / "colours@v2").iterdir()) == [CARD_FILE, CONFIG_FILE, MODEL_FILE]
    assert (
        'timm.create_model("hf-hub:me/colours@v2", pretrained=True)' in (there / "colours@v2" / CARD_FILE).read_text()
    )


MEASURES = {
    None: {"accuracy": 0.5, "among the best five": 1.0},
    "mask_rcnn": {"box AP": 0.25, "mask AP": math.nan},
    "upernet": {"mean IoU": 0.4},
}


@pytest.mark.parametrize("head", MEASURES)
def test_cards(head, tmp_path):
    """The hub's own reader finds licence, task and measures; the text has them too, and how to use the weights."""
    preprocessing = {} if head else PREPROCESSING
    record = Record(model="overlock_atto", head=head, classes=("a", "b"), preprocessing=preprocessing)
    write_card(tmp_path / CARD_FILE, record, settings=dict(epochs=3), measures=MEASURES[head], data="a/streets")
    card = huggingface_hub.ModelCard.load(tmp_path / CARD_FILE)
    known = {name: share for name, share in MEASURES[head].items() if not math.isnan(share)}
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == {None: "image-classification", "mask_rcnn": "object-detection"}.get(
        head, "image-segmentation"
    )
    assert [(x.metric_name, x.metric_value) for x in card.data.eval_results] == [
        (f"{name}, %", 100 * share) for name, share in known.items()
    ]
    for name, share in MEASURES[head].items():
        assert f"| {name}, % | {'none' if math.isnan(share) else f'{100 * share:.2f}'} |" in card.text
    for part in ("## Licence", "```python", "overlock predict IMAGE --checkpoint hf-hub:USER/NAME", "epochs: 3"):
        assert part in card.text


def test_nothing_private_goes_to_a_public_repository(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(tmp_path / "hub"))
    with pytest.raises(ValueError, match=r"me/colours: it is there already, and public; choose another name"):
        push(folder, "me/colours", private=True)
    assert not any((tmp_path / "hub" / "me" / "colours").iterdir())


def test_a_detector_is_pushed_without_timm_s_configuration(tmp_path, monkeypatch):
    record = Record(model="overlock_atto", head="faster_rcnn", classes=("a", "b"), model_args=dict(min_size=64))
    save_model(tmp_path / "run" / MODEL_FILE, record.make_network().state_dict(), record)
    measures = {"box AP": 0.25}
    write_card(tmp_path / "run" / CARD_FILE, record, settings=dict(epochs=3), measures=measures, data="a/streets")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(tmp_path / "hub"))
    push(tmp_path / "run", "me/streets")
    there = tmp_path / "hub" / "me" / "streets"
    assert sorted(path.name for path in there.iterdir()) == [CARD_FILE, MODEL_FILE]
    card = (there / CARD_FILE).read_text()
    assert "# faster_rcnn on overlock_atto, trained on streets" in card
    assert "| box AP, % | 25.00 |" in card
    assert 'Detector.from_checkpoint("hf-hub:me/streets")' in card
    asked = []

    def download(name, file, revision=None):
        asked.append((name, revision))
        return str(tmp_path / "hub" / name / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert Detector.from_checkpoint("hf-hub:me/streets").record == record
    assert Detector.from_checkpoint("hf-hub:me/streets@v2").record == record
    assert asked == [("me/streets", None), ("me/streets", "v2")]


def test_the_hub_refuses(folder, monkeypatch):
    class Refusing(Hub):
        def create_repo(self, *_, **__):
            raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing(folder))
    with pytest.raises(ValueError, match=r"the hub did not take it.*no network here.*hf auth login"):
        push(folder, "me/colours")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"model\.safetensors, config\.json, README\.md not found"):
        push(tmp_path, "me/it")
    with pytest.raises(ValueError, match=r"no model\.safetensors in this folder"):
        find_weights(tmp_path)


def test_what_timm_pushed_is_loaded(tmp_path, monkeypatch):
    """Without a record of ours: model, classes and preparation are in timm's configuration."""
    model = randomise(timm.create_model("overlock_atto", num_classes=2, in_chans=1, global_pool="max"))
    preparation = dict(input_size=(1, 48, 48), mean=(0.4,), std=(0.2,))
    settings = dict(label_names=["no", "yes"], pretrained_cfg=preparation, model_args={"global_pool": "max"})
    timm.models.save_for_hf(model, tmp_path / "hub" / "me" / "it", model_config=settings, safe_serialization=True)
    asked = []

    def download(name, file, revision=None):
        asked.append(file)
        return str(tmp_path / "hub" / name / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for source in ("hf-hub:me/it", tmp_path / "hub" / "me" / "it"):
        network, record = load_classifier(source)
        assert record.classes == ("no", "yes")
        assert (record.model, record.channels) == ("overlock_atto", 1)
        assert record.preprocessing["input_size"] == (1, 48, 48)
        assert record.preprocessing["mean"] == (0.4,)
        x = torch.rand(1, 1, 48, 48)
        assert torch.equal(network(x), model(x))
    assert asked[0] == MODEL_FILE
