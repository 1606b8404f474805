"""overlock ablate: rows trained alike, gone on with where they were stopped, shared, and put into one table."""

from __future__ import annotations

import csv
import json
import os
import signal

import pytest
import torch
from runs import assert_same, make_images

from overlock.ablation import MIXERS, ROADMAP
from overlock.cli import main
from overlock.study import run as study_run
from overlock.study.plan import Study
from overlock.training.classification import make_job
from overlock.training.trainer import Trainer

QUICK = ("--image-size", 32, "--epochs", 1, "--batch-size", 4, "--workers", 0, "--accelerator", "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("study") / "data", 5)


def ablate(*words: object) -> int:
    return main(["ablate", *map(str, words)])


def fails(capsys, *words: object) -> str:
    code = ablate(*words)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a study of two rows and two seeds."""
    output = tmp_path_factory.mktemp("study") / "out"
    assert ablate("roadmap", "--data", data, "--output", output, "--rows", "plain,gate", "--seeds", "0,1", *QUICK) == 0
    return output


def test_table(finished, capsys, data, monkeypatch):
    """Published and measured figures of each row; what is finished is not trained again."""
    monkeypatch.setattr(study_run, "train", lambda *_, **__: pytest.fail("trained again"))
    words = ("roadmap", "--data", data, "--output", finished, "--rows", "plain,gate", "--seeds", "0,1")
    assert ablate(*words, *QUICK, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads((finished / "table.json").read_text())
    with (finished / "table.csv").open() as file:
        assert [line["row"] for line in csv.DictReader(file)] == ["plain", "gate"]
    assert (finished / "table.png").read_bytes().startswith(b"\x89PNG")
    for name, row in zip(("plain", "gate"), rows, strict=True):
        results = [json.loads((finished / name / f"seed{i}" / "result.json").read_text())["top1"] for i in (0, 1)]
        assert row["title"] == ROADMAP[name].title
        assert (row["paper_top1"], row["paper_miou"]) == (ROADMAP[name].paper.top1, ROADMAP[name].paper.miou)
        assert row["n"] == 2
        assert row["top1"] == pytest.approx(sum(results) / 2)
        assert row["top1_std"] == pytest.approx(abs(results[0] - results[1]) / 2**0.5)
        assert row["images_per_second"] > 0
        assert 0.5 < row["params"] < 1.0
    assert ablate(*words, *QUICK) == 0
    out = capsys.readouterr().out
    assert "PlainNet" in out
    assert "…" not in out
    assert "80.8" in out


def test_a_row_without_runs_has_the_classes_of_the_data(finished, capsys, data):
    """As the rows beside it, so that their parameters can be compared."""
    words = ("roadmap", "--report", "--data", data, "--output", finished, *QUICK)
    assert ablate(*words, "--rows", "gate,aux_loss", "--json") == 0
    gate, other = json.loads(capsys.readouterr().out)
    assert (other["n"], other["top1"], other["images_per_second"]) == (0, None, None)
    assert abs(gate["params"] - other["params"]) < 0.1  # a thousand classes have 0.2 M more


def test_other_settings_are_refused(finished, capsys, data):
    words = ("roadmap", "--data", data, "--output", finished, "--rows", "plain", *QUICK)
    assert "plain/seed0/result.json: this row was trained with other settings of epochs" in " ".join(
        fails(capsys, *words, "--epochs", 2).split()
    )


def test_a_stopped_row_goes_on(finished, data, tmp_path, monkeypatch):
    """To the weights of one that was not stopped; the row before it is not trained again."""
    words = ("roadmap", "--data", data, "--output", tmp_path, "--rows", "plain,gate", *QUICK)
    step, calls = Trainer.train_step, []

    def stop(self, *arguments):
        calls.append(1)
        if len(calls) == 5:  # the second step of the second row
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        assert ablate(*words) == 128 + signal.SIGTERM
    assert (tmp_path / "plain" / "seed0" / "result.json").exists()
    assert not (tmp_path / "gate" / "seed0" / "result.json").exists()
    calls.clear()
    monkeypatch.setattr(Trainer, "train_step", stop)
    assert ablate(*words) == 0
    assert len(calls) < 3
    for row in ("plain", "gate"):
        assert_same(tmp_path / row / "seed0", finished / row / "seed0")


@pytest.mark.slow
def test_processes_share_the_rows(data, tmp_path, capsys):
    words = ("mixers", "--data", data, "--output", tmp_path, "--rows", "involution,volo", *QUICK)
    assert ablate(*words, "--processes", 2, "--json") == 0
    assert [row["n"] for row in json.loads(capsys.readouterr().out)] == [1, 1]
    assert all((tmp_path / f"process{i}.txt").is_file() for i in (0, 1))


def test_a_row_that_another_process_has_is_left_to_it(data, tmp_path, monkeypatch, capsys):
    study = Study(table="mixers", data=str(data), size="small", output=tmp_path, rows=("volo",))
    (job,) = study.jobs()
    monkeypatch.setattr(study_run, "train", lambda *_, **__: pytest.fail("trained"))
    with study_run._taken(study, job) as mine:
        assert mine
        assert ablate("mixers", "--data", data, "--output", tmp_path, "--rows", "volo", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["n"] == 0


def test_rows_are_trained_alike(data, tmp_path):
    """The same settings but for the model, the same order of images, the same initial values where names agree."""
    study = Study(table="roadmap", data=str(data), size="small", output=tmp_path)
    assert study.rows == tuple(ROADMAP)
    settings = [study.config(row, 3).to_dict() for row in ("se", "gate")]
    different = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert different == {"model", "output"}
    states = [make_job(study.config(row, 3)).network.state_dict() for row in ("se", "gate")]
    common = [name for name in states[0].keys() & states[1].keys() if states[0][name].shape == states[1][name].shape]
    assert len(common) > 40
    assert all(torch.equal(states[0][name], states[1][name]) for name in common)


def test_the_papers_size(data, tmp_path):
    config = Study(table="mixers", data=str(data), size="paper", output=tmp_path).config("dcnv3", 0)
    assert (config.model, config.image_size, config.epochs, config.drop_path) == ("overlock_mixer_dcnv3", 224, 120, 0.1)


def test_wrong_arguments(data, tmp_path, capsys):
    """One sentence each."""
    words = ("roadmap", "--data", data, "--output", tmp_path / "out")
    assert "did you mean 'gate'?" in fails(capsys, *words, "--rows", "gat")
    assert f"the rows are {', '.join(MIXERS)}" in fails(capsys, "mixers", *words[1:], "--rows", "zzzz")
    assert "--seeds must be whole numbers" in fails(capsys, *words, "--seeds", "a")
    assert "seeds must be different" in fails(capsys, *words, "--seeds", "1,1")
    assert "--processes must be at least 1" in fails(capsys, *words, "--processes", 0)
    assert "table" in fails(capsys, "roadmaps", *words[1:])
    assert "epochs must be" in fails(capsys, *words, "--epochs", 0)
    assert "choose another one for results" in fails(capsys, "roadmap", "--data", data, "--output", data)
    assert not (tmp_path / "out").exists()
