"""What a study trains: its rows, seeds and settings, and which of its runs are done."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overlock.ablation import MIXERS, ROADMAP, Row
from overlock.ablation.models import model_name
from overlock.files import write_atomically
from overlock.network import VARIANTS
from overlock.training import RECIPES, TrainConfig
from overlock.training.run import CHANGEABLE
from overlock.training.state import differing

TABLES: dict[str, dict[str, Row]] = dict(roadmap=ROADMAP, mixers=MIXERS)
PREFIXES = dict(roadmap="roadmap", mixers="mixer")
RECIPE_OF_SIZE = dict(small="ablation_small", paper="ablation")
RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Rows of a table, trained alike.

    Raises:
        ValueError: for rows, seeds or settings that will not do.
    """

    table: str
    """'roadmap' or 'mixers'."""
    data: str
    """To learn from, as in training."""
    size: str
    """'small' or 'paper': of the networks, and which recipe."""
    output: Path
    """Folder for the runs and the table."""
    rows: tuple[str, ...] = ()
    """Keys of the table's rows; all unless given."""
    seeds: tuple[int, ...] = (0,)
    """Each row is trained once with each."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all runs that differ from the recipe's; groups of settings as mappings."""

    def __post_init__(self) -> None:
        known = TABLES[self.table]
        for row in self.rows:
            if row not in known:
                near = difflib.get_close_matches(row, known, n=1)
                mend = f"did you mean {near[0]!r}?" if near else f"the rows are {', '.join(known)}"
                raise ValueError(f"unknown row {row!r} of {self.table}; {mend}")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different whole numbers from 0 on, got {list(self.seeds)}")
        if not self.rows:
            object.__setattr__(self, "rows", tuple(known))
        self.config(self.rows[0], self.seeds[0])  # refuses settings that cannot be

    def row(self, name: str) -> Row:
        """A row of the table."""
        return TABLES[self.table][name]

    def folder(self, row: str) -> Path:
        """Of a row's runs."""
        return self.output / row

    def jobs(self) -> Iterator[Job]:
        """All runs: every row with the first seed, then with the next."""
        for seed in self.seeds:
            for row in self.rows:
                yield Job(study=self, row=row, seed=seed)

    def config(self, row: str, seed: int) -> TrainConfig:
        """The settings of a run; all but the model, the seed and the folder are those of every other."""
        settings = RECIPES[RECIPE_OF_SIZE[self.size]](self.data).to_dict()
        for name, value in self.changes.items():
            settings[name] = {**settings[name], **value} if isinstance(value, Mapping) else value
        if settings["drop_path"] is None:
            settings["drop_path"] = VARIANTS["overlock_xt"].drop_path
        settings |= dict(
            model=model_name(PREFIXES[self.table], row), model_args=dict(size=self.size), seed=seed,
            output=str(self.folder(row) / f"seed{seed}"),
        )  # fmt: skip
        return TrainConfig.from_dict(settings)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of a study."""

    study: Study
    row: str
    seed: int

    @property
    def config(self) -> TrainConfig:
        return self.study.config(self.row, self.seed)

    @property
    def title(self) -> str:
        return f"{self.study.row(self.row).title}, seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """What the finished run came to: top1, seconds, classes; None where it is not finished.

        Raises:
            ValueError: for a run that was made with other settings, and for a damaged file.
        """
        path = Path(self.config.output) / RESULT
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            changed = [n for n in differing(found["settings"], _plain(self.config)) if not n.startswith(CHANGEABLE)]
            result = {name: found[name] for name in ("top1", "seconds", "classes")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a readable result ({error}); delete it to finish its run again") from None
        if changed:
            raise ValueError(
                f"{path}: this row was trained with other settings of {', '.join(changed)}; give them again, or choose "
                "another output"
            )
        return result

    def write_result(self, *, top1: float, seconds: float, classes: int) -> None:
        """Note that the run is finished.

        Args:
            top1: its accuracy, of 0 to 1.
            seconds: what it took.
            classes: how many the data have.

        Raises:
            ValueError: where it cannot be written.
        """
        content = dict(top1=top1, seconds=seconds, classes=classes, settings=_plain(self.config))
        write_atomically(Path(self.config.output) / RESULT, json.dumps(content, indent=2) + "\n")


def _plain(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict()))
