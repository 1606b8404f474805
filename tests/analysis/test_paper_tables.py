"""The paper's figures beside what is counted."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest

from overlock.analysis import count_cost, paper_tables
from overlock.analysis.paper_tables import Figure, compare_tables
from overlock.cli import main


def test_deviation_is_beyond_rounding():
    of = dict(table=6, row="", unit="", digits=1, published=2.5)
    assert Figure(**of, measured=2.549).deviation == 0
    assert Figure(**of, measured=2.551).deviation == pytest.approx(0.0204)
    assert Figure(**of, measured=2.4).deviation == pytest.approx(-0.04)


@pytest.mark.slow
def test_all_tables(capsys):
    pytest.importorskip("transformers")
    assert main(["summary", "--paper", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert Counter(row["table"] for row in rows) == {2: 8, 3: 6, 4: 6, 5: 6, 6: 24, 7: 16}
    assert sum(row["deviation"] == 0 for row in rows if row["table"] == 6) == 22  # XT's own row does not come out
    assert all(abs(row["deviation"]) < 0.03 for row in rows if row["table"] < 6)
    tiny = next(row for row in rows if row["row"] == "overlock_t" and row["unit"].startswith("param"))
    assert (tiny["published"], tiny["deviation"]) == (33, 0)
    assert tiny["measured"] == pytest.approx(count_cost("overlock_t")[-1].params / 1e6)


def test_what_deviates_is_marked(capsys, monkeypatch):
    first = list(islice(compare_tables(), 2))  # overlock_xt's, of which the multiply-adds do not come out
    monkeypatch.setattr(paper_tables, "compare_tables", lambda: iter(first))
    assert main(["summary", "--paper"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "overlock_xt" in out
    assert "1 of 2 figures are as printed" in out
    assert "+2.7 %" in out


@pytest.mark.parametrize("words", [["overlock_t"], ["--task", "upernet"], ["--image_size", "64", "64"]])
def test_the_paper_is_taken_as_it_is(words, capsys):
    assert main(["summary", "--paper", *words]) == 2
    assert "leave " in capsys.readouterr().err
