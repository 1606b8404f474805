"""How soon the page of ``overlock demo`` is there, and how soon it answers a click, as a visitor's browser sees it.

    python benchmarks/demo.py                              # the package's own network
    python benchmarks/demo.py --csv demo.csv --options '--checkpoint runs/photos --detector runs/cells'

The server runs in a process of its own, the browser is the distribution's Chromium, both on this machine. Each visit is
a new one, with an empty cache. A click's time is from the mouse to the changed picture of the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Page, sync_playwright
from timing import report

PARTS = {
    "view: classes": "#classes [data-testid=label-output-value]",
    "view: kernels": "#kernels img",
    "view: last map": "#stage4 img",
}
CHANGED = "([what, before]) => document.querySelector(what)?.src !== before"
LONGEST = 120_000  # milliseconds to wait for anything
SETTLING = 2000  # milliseconds before the first click, in which the last pictures are drawn


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def served(words: list[str]) -> Iterator[tuple[str, float]]:
    """Inside, the command runs: its address, and the seconds until it gave it.

    Raises:
        RuntimeError: where the command ends instead, with what it said.
    """
    started = time.perf_counter()
    command = [sys.executable, "-m", "overlock.cli", "demo", "--port", str(free_port()), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        said = []
        try:
            for line in server.stdout or ():
                said.append(line)
                if line.startswith("the page is at "):
                    yield line.split()[4], time.perf_counter() - started
                    return
            raise RuntimeError(f"the command ended: {''.join(said)}")
        finally:
            server.terminate()


def visit(page: Page, address: str) -> dict[str, float]:
    """Seconds from the address to each part of the page."""
    started = time.perf_counter()
    page.goto(address)
    seconds = {}
    for name, selector in PARTS.items():
        page.wait_for_selector(selector, state="attached")
        seconds[name] = time.perf_counter() - started
    return seconds


def click(page: Page, x: float, y: float) -> float:
    """Seconds until the affinity of a point of the photo, given as shares, has changed."""
    what = "#kernels img"
    before = page.locator(what).first.get_attribute("src")
    box: Any = page.locator("#photo img").bounding_box()
    started = time.perf_counter()
    page.locator("#photo img").click(position=dict(x=x * box["width"], y=y * box["height"]))
    page.wait_for_function(CHANGED, arg=[what, before], polling=10)
    return time.perf_counter() - started


def measure(address: str, visits: int, clicks: int) -> dict[str, list[float]]:
    """Seconds of each kind, over all visits."""
    seconds: dict[str, list[float]] = {}
    with sync_playwright() as driver:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # root in a container
        for _ in range(visits):
            context = browser.new_context(viewport=dict(width=1280, height=900))
            page = context.new_page()
            page.set_default_timeout(LONGEST)
            for name, passed in visit(page, address).items():
                seconds.setdefault(name, []).append(passed)
            page.wait_for_timeout(SETTLING)
            for i in range(clicks):
                place = (i + 0.5) / clicks
                seconds.setdefault("click", []).append(click(page, place, 1 - place))
            context.close()
        browser.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--clicks", type=int, default=8, help="Of each visit.")
    parser.add_argument("--options", default="", help="Of overlock demo, besides its port.")
    parser.add_argument("--csv", default=None, help="File to write all figures to.")
    options = parser.parse_args()
    with served(shlex.split(options.options)) as (address, started):
        seconds = {"start of the server": [started], **measure(address, options.visits, options.clicks)}
    rows = [
        {"what": name, "times": len(all_), "median, s": statistics.median(all_), "longest, s": max(all_)}
        for name, all_ in seconds.items()
    ]
    report("The page", rows, options.csv)


if __name__ == "__main__":
    main()
