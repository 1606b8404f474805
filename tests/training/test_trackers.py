"""A run in an experiment tracker."""

from __future__ import annotations

import csv
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from runs import make_images, run, settings

from overlock.training import trackers
from overlock.training.stop import RunStoppedError


class Recorder:
    """What a tracker keeps, by the name of the run."""

    def __init__(self):
        self.runs = {}

    def open(self, folder, name):
        name = name or f"run {len(self.runs)}"
        kept = self.runs.setdefault(name, SimpleNamespace(points=[], settings=None, ends=[]))
        logger = SimpleNamespace(
            log_hyperparams=lambda values: setattr(kept, "settings", values),
            log_metrics=lambda values, step: kept.points.append((step, values)),
            finalize=kept.ends.append,
        )
        return logger, name


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(trackers._LOGGERS, "wandb", recorder.open)
    monkeypatch.setattr("overlock.training.run.check_tracker", lambda name: None)
    return recorder


def test_log_and_settings_go_there(recorder, tmp_path):
    """The rows of log.csv at their steps; another run of the folder is another run there."""
    data = make_images(tmp_path / "data")
    run(settings(data, tmp_path / "run", logger="wandb"))
    kept = recorder.runs["run 0"]
    with (tmp_path / "run" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(step, points["epoch/loss"]) for step, points in kept.points] == [
        (int(row["step"]), float(row["loss"])) for row in rows
    ]
    assert kept.settings["optim"]["lr"] == 1e-3
    assert kept.ends == ["success"]
    run(settings(data, tmp_path / "run", logger="wandb"), overwrite=True)
    assert list(recorder.runs) == ["run 0", "run 1"]


def test_a_resumed_run_goes_on_there(recorder, tmp_path, monkeypatch):
    """Of the same name; the run that was stopped did not end well, and the tracker may change."""
    data = make_images(tmp_path / "data")
    config = settings(data, tmp_path / "run", logger="wandb")

    def stop_after_one(self, *, better):
        raise RunStoppedError(15, "stopped")

    with monkeypatch.context() as patched:
        patched.setattr("overlock.training.reports.RunLog.write", stop_after_one)
        with pytest.raises(RunStoppedError):
            run(config)
    assert recorder.runs["run 0"].ends == ["failed"]
    run(config, resume=True)
    assert list(recorder.runs) == ["run 0"]
    assert recorder.runs["run 0"].ends == ["failed", "success"]
    assert json.loads((tmp_path / "run" / trackers.RUN_FILE).read_text())["run"] == "run 0"


def test_an_absent_tracker_is_refused(tmp_path, monkeypatch):
    """In one sentence, before anything is read or written."""
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"logger trackio needs its package, which is not installed: pip install"):
        run(settings(tmp_path / "none", tmp_path / "run", logger="trackio"))
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    (tmp_path / "wandb").mkdir()  # a folder of this name is no package
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="pip install wandb"):
        trackers.check_tracker("wandb")
    with pytest.raises(ValueError, match="logger"):
        settings(tmp_path / "none", tmp_path / "run", logger="comet")


def test_trackio_s_interface(monkeypatch):
    """Settings, points and end go where Trackio takes them."""
    kept = SimpleNamespace(config={}, points=[], ended=False)
    kept.log = lambda values, step: kept.points.append((step, values))
    kept.finish = lambda: setattr(kept, "ended", True)
    module = ModuleType("trackio")
    module.init = lambda **options: setattr(kept, "options", options) or kept
    monkeypatch.setitem(sys.modules, "trackio", module)
    logger = trackers.TrackioLogger("overlock", "streets-1")
    logger.log_hyperparams({"epochs": 2})
    logger.log_metrics({"epoch/loss": 0.5}, step=8)
    logger.finalize("success")
    assert kept.options["name"] == logger.version == "streets-1"
    assert kept.options["resume"] == "allow"
    assert (kept.config, kept.points, kept.ended) == ({"epochs": 2}, [(8, {"epoch/loss": 0.5})], True)


@pytest.mark.parametrize("name", ["mlflow", "trackio", "wandb"])
def test_installed_trackers(name, tmp_path, monkeypatch):
    """A run, and the same run gone on with, in each tracker that is installed, without a network."""
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    data = make_images(tmp_path / "data")
    run(settings(data, tmp_path / "run", epochs=1, logger=name))
    noted = json.loads((tmp_path / "run" / trackers.RUN_FILE).read_text())
    run(settings(data, tmp_path / "run", epochs=1, logger=name), resume=True)
    assert json.loads((tmp_path / "run" / trackers.RUN_FILE).read_text()) == noted
    assert noted["tracker"] == name
    assert noted["run"]
