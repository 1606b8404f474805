"""Two checkouts of this package side by side on CPU: every row of the tables in docs/performance.md, old over new.

    git worktree add ../before COMMIT
    python benchmarks/checkouts.py ../before . [--repeats 15] [--only '[contmix,fused]'] [--csv FILE]

Each checkout has a process of its own, and the two take turns, call by call. A ratio is the median over the rounds of
the old one's time over the new one's: above 1, the new one is faster. Only the public API is used, which both must
have.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CONTMIX = {  # B, G, D = C, H, W, K; Focus-Net of OverLoCK-T
    "50 x 80, K 13": (1, 8, 16, 50, 80, 13),
    "14 x 14, K 13": (1, 8, 16, 14, 14, 13),
    "7 x 7, K 7": (1, 16, 16, 7, 7, 7),
    "14 x 14, K 13, batch 8": (8, 8, 16, 14, 14, 13),
    "7 x 7, K 7, batch 8": (8, 16, 16, 7, 7, 7),
}
IMAGES = {  # batch, size, whether features are taken
    "224 x 224": (1, (224, 224), False),
    "224 x 224, batch 16": (16, (224, 224), False),
    "features at 512 x 512": (1, (512, 512), True),
    "features at 800 x 1280": (1, (800, 1280), True),
}
DEPTHWISE = {"64 x 56 x 56, K 17": (64, 56, 17), "128 x 28 x 28, K 15": (128, 28, 15),
             "256 x 14 x 14, K 13": (256, 14, 13), "512 x 7 x 7, K 7": (512, 7, 7)}  # fmt: skip
REGIONS = 49
BURST = 0.3  # seconds


def contmix_call(shape: str, name: str) -> Callable[[], object]:
    from overlock.ops import backend, contmix  # noqa: PLC0415

    b, g, d, h, w, k = CONTMIX[shape]
    query, value = torch.randn(b, g, d, h, w) / d**0.5, torch.randn(b, g, d, h, w)
    key, weight = torch.randn(b, g, d, REGIONS), torch.randn(k * k, REGIONS) / REGIONS**0.5
    bias, rpb = torch.randn(k * k), torch.randn(g, 2 * k - 1, 2 * k - 1)

    def call() -> object:
        with backend(name), torch.inference_mode():
            return contmix(query, key, value, weight, bias, rpb, k)

    return call


def fused_call(model: str, images: str) -> Callable[[], object]:
    import timm  # noqa: PLC0415

    import overlock  # noqa: PLC0415

    batch, size, features = IMAGES[images]
    network = timm.create_model(model, **({"features_only": True} if features else {})).eval()
    network = overlock.fuse(network.to(memory_format=torch.channels_last))
    x = torch.randn(batch, 3, *size).to(memory_format=torch.channels_last)

    def call() -> object:
        with torch.inference_mode():
            return network(x)

    return call


def depthwise_call(shape: str, part: str) -> Callable[[], object]:
    from overlock.ops import depthwise_conv2d  # noqa: PLC0415

    channels, side, k = DEPTHWISE[shape]
    x = torch.randn(8, channels, side, side).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, k, k) / k
    if part == "forward":
        return lambda: depthwise_conv2d(x, weight, None)
    x.requires_grad_()
    weight.requires_grad_()

    def call() -> object:
        y = depthwise_conv2d(x, weight, None)
        return torch.autograd.grad(y, (x, weight), y.detach())

    return call


def training_call(model: str) -> Callable[[], object]:
    import timm  # noqa: PLC0415

    import overlock  # noqa: F401, PLC0415

    network = timm.create_model(model).to(memory_format=torch.channels_last).train()
    x, classes = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last), torch.zeros(8, dtype=torch.long)

    def call() -> None:
        torch.nn.functional.cross_entropy(network(x), classes).backward()
        network.zero_grad(set_to_none=True)

    return call


def cases() -> dict[str, Callable[[], Callable[[], object]]]:
    """What makes the call of each row, by the row's name."""
    made: dict[str, Callable[[], Callable[[], object]]] = {}
    for shape in CONTMIX:
        for name in ("cpu", "torch"):
            made[f"contmix, {name}: {shape}"] = functools.partial(contmix_call, shape, name)
    for model in ("overlock_xt", "overlock_t"):
        for images in IMAGES:
            made[f"fused, {model}: {images}"] = functools.partial(fused_call, model, images)
    for shape in DEPTHWISE:
        for part in ("forward", "with gradients"):
            made[f"depthwise, {part}: {shape}"] = functools.partial(depthwise_call, shape, part)
    made["training step, overlock_xt: batch 8, 224 x 224"] = functools.partial(training_call, "overlock_xt")
    return made


def median_of_burst(call: Callable[[], object]) -> float:
    """Seconds of a call, of many where it is short: the first ones meet the other process's threads, still spinning."""
    seconds: list[float] = []
    while sum(seconds) < BURST:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def serve() -> None:
    """Make the calls that are named on standard input, one after another, and answer with their seconds."""
    made, name, call = cases(), "", lambda: None
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        if line.strip() != name:
            name = line.strip()
            torch.manual_seed(0)
            call = made[name]()
            call()
            call()
        print(json.dumps(median_of_burst(call)), file=answers, flush=True)


@contextmanager
def server(checkout: Path) -> Iterator[Callable[[str], float]]:
    """What times a row's call in a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def seconds(name: str) -> float:
            print(name, file=process.stdin, flush=True)
            answer = process.stdout.readline()  # type: ignore[union-attr]
            if not answer:
                raise RuntimeError(f"{name} failed in {checkout}; its error is above")
            return float(json.loads(answer))

        yield seconds
        process.stdin.close()  # type: ignore[union-attr]


def command_seconds(checkout: Path, name: str) -> float:
    """Of a row's command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    started = time.perf_counter()
    subprocess.run([sys.executable, *COMMANDS[name]], check=True, capture_output=True, env=environment)
    return time.perf_counter() - started


COMMANDS = {
    "start: --help": ["-m", "overlock.cli", "--help"],
    "start: import overlock, timm": ["-c", "import overlock, timm"],
    "start: predict cat.jpg, compiled": [
        "-m", "overlock.cli", "predict", str(Path(__file__).parents[1] / "examples" / "photos" / "cat.jpg"),
    ],
}  # fmt: skip


def main(old: Path, new: Path, repeats: int = 15, only: list[str] | None = None, csv: str | None = None) -> None:
    """Time every row in both checkouts by turns.

    Args:
        old: folder of a checkout.
        new: folder of another.
        repeats: rounds of each row.
        only: rows that begin with one of these, all by default.
        csv: file for the table.
    """
    from timing import middle, ratio, report, spread  # noqa: PLC0415

    rows = []
    with server(old) as in_old, server(new) as in_new:
        for name in [*cases(), *COMMANDS]:
            if only and not name.startswith(tuple(only)):
                continue
            before, after, rounds = in_old, in_new, repeats
            if name in COMMANDS:
                before, after = (functools.partial(command_seconds, checkout) for checkout in (old, new))
                rounds = max(3, repeats // 3)
            pairs = [(before(name), after(name)) for _ in range(rounds + 1)][1:]
            olds, news = (list(seconds) for seconds in zip(*pairs, strict=True))
            rows.append(
                {
                    "row": name, "old, ms": middle(olds), "new, ms": middle(news), "old over new": ratio(olds, news),
                    "largest spread, %": max(spread(olds), spread(news)),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)  # noqa: T201
    report("Two checkouts", rows, csv)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        from jsonargparse import auto_cli

        auto_cli(main)
