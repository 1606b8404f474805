"""What the texts point at is there."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = "".join(file.read_text() for file in sorted((ROOT / "src").rglob("*.py")))


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("text", TEXTS, ids=lambda file: file.name)
def test_links(text):
    lost = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text.read_text()):
        name, _, anchor = link.partition("#")
        target = text.parent / name if name else text
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            lost.append(link)
    assert not lost


def test_names_of_the_architecture():
    """Files, functions and classes in backticks."""
    prose = re.sub(r"```.*?```", "", (ROOT / "docs" / "architecture.md").read_text(), flags=re.DOTALL)
    lost = []
    for name in re.findall(r"`([^`\n]+)`", prose):
        if name.endswith(".py") and " " not in name:
            known = any(str(file).endswith("/" + name) for file in (ROOT / "src").rglob("*.py"))
        elif re.fullmatch(r"(?:[A-Z]\w+|[a-z]+(?:_[a-z]+)+)(?:\.\w+)?", name):
            last = name.rpartition(".")[2]
            known = hasattr(builtins, name) or re.search(rf"(?:def|class) {last}\b|\b{last} =|self\.{last}\b", SOURCES)
        else:
            continue
        if not known:
            lost.append(name)
    assert not lost


@pytest.mark.parametrize("text", TEXTS, ids=lambda file: file.name)
def test_lines_of_prose(text):
    """Short ones, as in the code; rows of tables, pictures and commands may be longer."""
    prose = re.sub(r"```.*?```", "", text.read_text(), flags=re.DOTALL)
    assert not [line for line in prose.splitlines() if len(line) > 120 and not line.startswith(("|", "!["))]
