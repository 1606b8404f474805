"""A run in an experiment tracker, by Lightning's loggers: MLflow, Trackio or Weights & Biases.

Where they send it is theirs to say, by their own settings: ``MLFLOW_TRACKING_URI``, ``WANDB_MODE``, ``TRACKIO_DIR``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from overlock.files import write_atomically

PROJECT = "overlock"
RUN_FILE = "tracker.json"
"""In the run's folder: which tracker it is in, and by which name there, to go on with after a stop."""


class TrackioLogger(Logger):
    """Trackio, which Lightning has no logger for.

    Args:
        project: to add the run to.
        name: of the run; one that is there is gone on with.
    """

    def __init__(self, project: str, name: str):
        super().__init__()
        import trackio  # noqa: PLC0415

        self._project, self._name = project, name
        self.run = trackio.init(project=project, name=name, resume="allow", embed=False)

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        return self._name

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.run.log(dict(metrics), step=step)

    def log_hyperparams(self, params: Mapping[str, Any], *_: Any, **__: Any) -> None:
        self.run.config |= dict(params)

    def finalize(self, status: str) -> None:
        self.run.finish()


def check_tracker(name: str | None) -> None:
    """Raise ValueError where the tracker's package is not installed."""
    package = find_spec(name) if name is not None else None
    if name is not None and (package is None or package.origin is None):  # a mere folder of that name has no origin
        raise ValueError(f"logger {name} needs its package, which is not installed: pip install {name}")


def open_tracker(name: str, folder: Path, settings: Mapping[str, Any], *, begin: bool) -> Logger:
    """The run in a tracker: a new one, or on going on the one that it began.

    Args:
        name: 'mlflow', 'trackio' or 'wandb'.
        folder: of the run, whose name is the run's there.
        settings: of the run, which the tracker shows.
        begin: begin a new run there, even if the folder has one.
    """
    file = folder / RUN_FILE
    noted = json.loads(file.read_text(encoding="utf-8")) if file.is_file() and not begin else {}
    known = noted.get("run") if noted.get("tracker") == name else None
    logger, run = _LOGGERS[name](folder, known)
    if known is None:
        logger.log_hyperparams(dict(settings))
        write_atomically(file, json.dumps(dict(tracker=name, project=PROJECT, run=run)))
    return logger


def close_tracker(logger: Logger, *, is_done: bool) -> None:
    """End the run there, as complete or as one to go on with.

    Weights & Biases would otherwise take the next run of the process for this one.
    """
    logger.finalize("success" if is_done else "failed")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish(exit_code=int(not is_done))


def _open_mlflow(folder: Path, run: str | None) -> tuple[Logger, str | None]:
    import mlflow  # noqa: PLC0415

    place = mlflow.get_tracking_uri()  # Lightning's own default, a folder, is refused by MLflow 3.17
    logger = MLFlowLogger(experiment_name=PROJECT, run_name=folder.name, tracking_uri=place, run_id=run)
    return logger, logger.run_id


def _open_trackio(folder: Path, run: str | None) -> tuple[Logger, str | None]:
    run = run or _make_name(folder)
    return TrackioLogger(PROJECT, run), run


def _open_wandb(folder: Path, run: str | None) -> tuple[Logger, str | None]:
    run = run or _make_name(folder)
    return WandbLogger(project=PROJECT, name=folder.name, id=run, save_dir=folder, resume="allow"), run


def _make_name(folder: Path) -> str:
    """A name that no other run has."""
    return f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"


_LOGGERS: dict[str, Callable[[Path, str | None], tuple[Logger, str | None]]] = dict(
    mlflow=_open_mlflow, trackio=_open_trackio, wandb=_open_wandb
)
