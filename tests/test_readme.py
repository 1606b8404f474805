"""What the README says is so."""

from __future__ import annotations

import re
from pathlib import Path

from overlock import VARIANTS
from overlock.analysis import count_cost

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_length():
    """It is read by people in a hurry; the rest is in docs."""
    assert len(README.splitlines()) < 120


def test_tables_of_sizes():
    for text in (README, (ROOT / "docs" / "python.md").read_text()):
        rows = re.findall(r"\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]*) ?\|", text)
        assert [row[0] for row in rows] == list(VARIANTS)
        for name, params, macs, top1 in rows:
            paper = VARIANTS[name].paper
            if paper:
                assert (float(params), float(macs), float(top1)) == (paper.params, paper.macs, paper.top1)
            else:
                total = count_cost(name)[-1]
                assert float(params) == round(total.params / 1e6, 1)
                assert float(macs) == round(total.macs / 1e9, 2)
                assert top1 == ""
