"""Accuracy against each cost, with the Pareto fronts (Figure 1), as a picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from overlock.analysis.tradeoff import Axis, Point
from overlock.figures import encode_figure, new_figure

COLOURS = {"OverLoCK": "#c0392b", "the paper's peers": "#1d2129", "others": "#2e86c1"}
TEXT = 7  # points
CHARACTERS = 55  # of the title, a panel
PLACES = ((5, 4), (5, -9), (-5, 4), (-5, -9))  # of a name beside its point, in points


def draw_tradeoff(axes: Sequence[Axis], *, score: str, title: str) -> bytes:
    """A PNG file, a panel for each cost.

    Args:
        axes: the costs.
        score: what the accuracy is.
        title: above all.

    Raises:
        ValueError: without matplotlib.
    """
    figure = new_figure(5.2 * len(axes), 5)
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        _draw_panel(panel, axis)
    panels[0].set_ylabel(score)
    panels[0].legend(loc="lower right", fontsize=TEXT)
    figure.suptitle(textwrap.fill(title, CHARACTERS * len(axes)))
    figure.canvas.draw()  # so that places are known
    for panel, axis in zip(panels, axes, strict=True):
        _name_points(panel, axis)
    return encode_figure(figure)


def _draw_panel(panel: Any, axis: Axis) -> None:
    costs = [axis.cost(point) for point in axis.points]
    if max(costs) > 3 * min(costs):
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(_label_some if max(costs) < 10 * min(costs) else "")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel(axis.title)
    panel.grid(alpha=0.3, which="both")
    for group, colour in COLOURS.items():
        shown = [point for point in axis.points if _group(point) == group]
        if not shown:
            continue
        places = [axis.cost(point) for point in shown], [point.score for point in shown]
        faces = ["none" if point.is_distilled else colour for point in shown]
        panel.scatter(*places, s=20, facecolors=faces, edgecolors=colour, label=group, zorder=3)
        for cost, point in zip(places[0], shown, strict=True):
            if axis.is_measured and point.trial is not None and point.trial.spread is not None:
                half = cost * point.trial.spread / 200
                panel.plot((cost - half, cost + half), (point.score, point.score), color=colour, alpha=0.3, zorder=1)
    for front, style, label in (
        (axis.paper_front(), ":", "front of the paper's"),
        (axis.front(), "--", "front of all"),
    ):
        if not front:
            continue
        places = [axis.cost(point) for point in front], [point.score for point in front]
        panel.step(*places, where="post", color="gray", linewidth=1, linestyle=style, label=label, zorder=2)


def _label_some(cost: float, _: int) -> str:
    """Of the ticks between powers of ten those whose labels have room."""
    return f"{cost:g}" if round(cost / 10 ** math.floor(math.log10(cost))) in (2, 3, 5, 7) else ""


def _group(point: Point) -> str:
    ours, peers, others = COLOURS
    return ours if point.is_ours else peers if point.is_of_paper else others


def _name_points(panel: Any, axis: Axis) -> None:
    """Names of ours, of the fronts, then of all others; each where it covers no point and no name, or not at all. Those
    of others must be nearest to their own points; ours are told by their colour.
    """
    pixel = panel.figure.dpi / 72
    taken = [tuple(panel.transData.transform((axis.cost(point), point.score))) for point in axis.points]
    boxes = [(x - 3 * pixel, y - 3 * pixel, x + 3 * pixel, y + 3 * pixel) for x, y in taken]
    ours = [point for point in axis.points if point.is_ours]
    for point in dict.fromkeys([*ours, *axis.front(), *axis.paper_front(), *axis.points]):
        x, y = panel.transData.transform((axis.cost(point), point.score))
        width, height = 0.56 * TEXT * pixel * len(point.method), TEXT * pixel
        for right, up in PLACES:
            corner = (x + right * pixel, y + up * pixel + height / 2)
            left = corner[0] - (width if right < 0 else 0)
            box = (left, y + up * pixel, left + width, y + up * pixel + height)
            inside = panel.bbox.x0 < box[0] and box[2] < panel.bbox.x1
            is_own = point.is_ours or math.dist(corner, (x, y)) <= min(math.dist(corner, place) for place in taken)
            if inside and is_own and not any(_overlap(box, other) for other in boxes):
                panel.annotate(
                    point.method, (axis.cost(point), point.score), xytext=(right, up), textcoords="offset points",
                    fontsize=TEXT, color=COLOURS[_group(point)], ha="right" if right < 0 else "left", va="bottom",
                )  # fmt: skip
                boxes.append(box)
                break


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
