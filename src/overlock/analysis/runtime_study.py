"""Networks measured in the fastest of their runtimes, in one interleaved run.

First each network tries every runtime, and each trial is a row of runtimes.csv: what is there is not tried again. Then
all networks take turns, each in its fastest runtime whose logits agree with the eager network's: latency.csv.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from overlock.analysis.cost import count_call, count_network
from overlock.analysis.latency import TOLERANCE, describe_machine, deviation_of, take_turns
from overlock.analysis.published import find_published
from overlock.analysis.runtimes import PREFIX, RUNTIMES, Call, Forms, architecture_of, make_forms, record_of
from overlock.checkpoints import build
from overlock.export.write import quietly
from overlock.files import write_atomically

TRIALS, LATENCY, EXPORTS = "runtimes.csv", "latency.csv", "exports"
USUAL_SIZE = 224
TRIAL_ROUNDS = 5


class Subject(NamedTuple):
    """A network at a size of images and of the batch."""

    model: str
    """timm's name, or a run's folder or file of weights."""
    image_size: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A network in a runtime."""

    model: str
    image_size: int
    batch: int
    runtime: str
    milliseconds: float | None = None
    """Of a call; None where it failed."""
    spread: float | None = None
    """Distance of the quartiles over the median, in percent."""
    deviation: float | None = None
    """Of its logits from those of the eager network as it is built, over the largest of these."""
    fault: str = ""
    """Why it does not count; empty where it does."""
    architecture: str
    """timm's name of the network: a run's folder may hold another one since."""
    machine: str

    @property
    def subject(self) -> Subject:
        return Subject(self.model, self.image_size, self.batch)

    @property
    def images_per_second(self) -> float:
        assert self.milliseconds is not None
        return 1e3 * self.batch / self.milliseconds


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is measured, and where."""

    models: Sequence[str]
    batches: Sequence[int]
    image_size: int | None
    """Side in pixels; for None that of a model's training or published accuracy, or 224."""
    runtimes: Sequence[str]
    """Names in ``RUNTIMES``."""
    device: torch.device
    rounds: int
    folder: Path

    def subjects(self) -> list[Subject]:
        """All networks, batch by batch."""
        return [Subject(model, self._size(model), batch) for batch in self.batches for model in self.models]

    def _size(self, model: str) -> int:
        if self.image_size is not None:
            return self.image_size
        record, published = record_of(model), find_published(model)
        if record is None:
            return published.image_size if published and published.image_size else USUAL_SIZE
        height, width = record.preprocessing["input_size"][1:]
        if height != width:
            raise ValueError(f"{model}: its images have {height} x {width} pixels; give the side of square ones")
        return int(height)

    def exports(self, subject: Subject) -> Path:
        """Folder for the files of a network, so that going on need not export again; removed in the end."""
        name = "_".join(Path(subject.model).parts).replace("/", "")
        return self.folder / EXPORTS / f"{name}_{subject.image_size}_batch{subject.batch}"

    def read(self, name: str) -> list[Trial]:
        """The trials in a file of the folder.

        Raises:
            ValueError: for a file that this command has not written, or that another machine has, or that tells of
                another network.
        """
        path = self.folder / name
        if not path.exists():
            return []
        try:
            trials = [_parse(row) for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: not written by this command; choose another --output") from None
        here = describe_machine(self.device)
        for trial in trials:
            if trial.machine != here:
                raise ValueError(f"{path}: measured on {trial.machine}, and this is {here}; choose another --output")
            if trial.model in self.models and trial.architecture != (now := architecture_of(trial.model)):
                raise ValueError(
                    f"{path}: {trial.model} was {trial.architecture} and is {now} now; choose another --output"
                )
        return trials

    def write(self, name: str, trials: Sequence[Trial]) -> None:
        """Write trials into a file of the folder."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [field.name for field in fields(Trial)], lineterminator="\n")
        writer.writeheader()
        for trial in trials:
            row = asdict(trial)
            writer.writerow({key: f"{x:.5g}" if isinstance(x, float) else x for key, x in row.items()})
        write_atomically(self.folder / name, buffer.getvalue())


def _parse(row: dict[str, str]) -> Trial:
    numbers: dict[str, Any] = {name: int(row[name]) for name in ("image_size", "batch")}
    for name in ("milliseconds", "spread", "deviation"):
        numbers[name] = float(row[name]) if row[name] else None
    return Trial(**{**row, **numbers})


Tell = Callable[[str], None]


def try_runtimes(study: Study, tell: Tell, tick: Tell) -> dict[Subject, tuple[Trial, Call | None]]:
    """Try what is not tried yet.

    Args:
        study: what to measure.
        tell: called with a sentence for each runtime that fails, and each that wins.
        tick: called with the name of what comes next, once before each subject.

    Returns:
        The fastest trial of each subject, with its call where it was made here.

    Raises:
        ValueError: for an unknown model, and one that runs in none of the runtimes.
    """
    done = study.read(TRIALS)
    fastest: dict[Subject, tuple[Trial, Call | None]] = {}
    for subject in study.subjects():
        tick(f"{subject.model}, batch {subject.batch}")
        tried = {trial.runtime for trial in done if trial.subject == subject}
        left = [name for name in study.runtimes if name not in tried]
        architecture = architecture_of(subject.model)
        left = [name for name in left if RUNTIMES[name].why_not(architecture, study.device) is None]
        calls: dict[str, Call] = {}
        if left:
            new, calls = _try(study, subject, left)
            done += new
            study.write(TRIALS, done)
            for trial in new:
                if trial.fault:
                    tell(f"{subject.model}, batch {subject.batch}, {trial.runtime}: {trial.fault}")
        mine = [trial for trial in done if trial.subject == subject and trial.runtime in study.runtimes]
        best = min((t for t in mine if not t.fault), key=lambda t: t.milliseconds or 0, default=None)
        if best is None:
            reasons = "; ".join(f"{t.runtime}: {t.fault}" for t in mine) or "none of those given is for it"
            raise ValueError(f"{subject.model} runs in no runtime ({reasons}); leave it out, or give other --runtimes")
        fastest[subject] = best, calls.get(best.runtime)
    return fastest


def _try(study: Study, subject: Subject, runtimes: Sequence[str]) -> tuple[list[Trial], dict[str, Call]]:
    """Trials, and the calls of those that count."""
    forms = make_forms(subject.model, study.device)
    images = _images(study, subject, forms.record.channels)
    with torch.inference_mode():
        reference = forms.plain(images)
    known: dict[str, Any] = dict(
        **subject._asdict(), architecture=forms.record.model, machine=describe_machine(study.device)
    )
    trials, calls = [], {}
    for name in runtimes:
        try:
            call = prepare(forms, images, name, study.exports(subject))
            deviation = deviation_of(call(), reference)
        except Exception as error:  # noqa: BLE001 - the libraries raise what they like; it is told
            trials.append(Trial(runtime=name, fault=_first_line(error), **known))
            continue
        if deviation > TOLERANCE:
            fault = f"logits are off by {deviation:.2g} of the largest"
            trials.append(Trial(runtime=name, deviation=deviation, fault=fault, **known))
            continue
        calls[name] = call
        trials.append(Trial(runtime=name, deviation=deviation, **known))
    timings = take_turns(calls, study.device, rounds=TRIAL_ROUNDS)
    measured = [
        Trial(**(asdict(trial) | asdict(timings[trial.runtime]))) if trial.runtime in timings else trial
        for trial in trials
    ]
    return measured, calls


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _images(study: Study, subject: Subject, channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (subject.batch, channels, subject.image_size, subject.image_size)
    return torch.randn(size, generator=generator).to(study.device)


def prepare(forms: Forms, images: torch.Tensor, runtime: str, folder: Path) -> Call:
    """A call of a network in a runtime, which has run once; files go into the folder, and are taken from there."""
    folder.mkdir(parents=True, exist_ok=True)
    with quietly():
        call = RUNTIMES[runtime].prepare(forms, images, folder)
        call()
    return call


def measure_latency(
    study: Study, fastest: dict[Subject, tuple[Trial, Call | None]], tick: Tell
) -> dict[Subject, Trial]:
    """All subjects in turns, each in its fastest runtime, unless latency.csv has just these already.

    Args:
        study: what to measure.
        fastest: by :func:`try_runtimes`.
        tick: called with what is done, once for each subject made ready and for each turn.
    """
    kept = {(trial.subject, trial.runtime): trial for trial in study.read(LATENCY)}
    wanted = {(subject, trial.runtime): trial for subject, (trial, _) in fastest.items()}
    if set(kept) != set(wanted):
        calls = {}
        for subject, (trial, call) in fastest.items():
            tick(f"{subject.model}, {trial.runtime}: made ready")
            calls[subject, trial.runtime] = call or _prepare_again(study, subject, trial.runtime)
        timings = take_turns(calls, study.device, rounds=study.rounds, tick=lambda: tick("measuring, in turns"))
        kept = {key: Trial(**(asdict(wanted[key]) | asdict(timing))) for key, timing in timings.items()}
        study.write(LATENCY, list(kept.values()))
    shutil.rmtree(study.folder / EXPORTS, ignore_errors=True)
    return {subject: trial for (subject, _), trial in kept.items()}


def _prepare_again(study: Study, subject: Subject, runtime: str) -> Call:
    """What an earlier process tried."""
    forms = make_forms(subject.model, study.device)
    return prepare(forms, _images(study, subject, forms.record.channels), runtime, study.exports(subject))


def count(subject: Subject) -> tuple[float, float]:
    """Multiply-adds in G and parameters in M, counted: of ours merged, of others as timm builds them."""
    size, record, architecture = (subject.image_size,) * 2, record_of(subject.model), architecture_of(subject.model)
    arguments = {} if record is None else record.model_args
    channels = 3 if record is None else record.channels
    if architecture.startswith(PREFIX):
        with torch.device("meta"):
            network = build(architecture, **{**arguments, "deploy": True}).eval()
            cost = count_network(network, image_size=size, in_chans=channels)
    else:
        network = build(architecture, **arguments).eval()
        cost = count_call("total", [network], network, torch.zeros(1, channels, *size))
    return cost.macs / 1e9, cost.params / 1e6
