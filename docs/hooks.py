"""What MkDocs does beside its plugins: pages made of the texts at the root, and links that leave the site."""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from overlock.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
PACKAGE = ROOT / "src" / "overlock"
FORMER = {"overlock.checkpoint", "overlock.fusion", "overlock.hub"}
"""Modules that have moved; their names are those of other modules here."""
DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose texts lie at the root, where people and package indexes look for them."""
    for page, source in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links within the repository into links within the site; what the site has not is linked at ``repo_url``."""
    if complete := COMPLETED.get(page.file.src_uri):
        markdown += complete(markdown)
    markdown = DIAGRAM.sub(lambda found: _picture_of(found.group(1), files), markdown)
    folder = PurePosixPath() if page.file.src_uri in FROM_ROOT else PurePosixPath("docs")
    pages = {source: page for page, source in FROM_ROOT.items()}

    def replace(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        name, hash_, anchor = target.partition("#")
        path = _normalise(folder / name)
        path = pages.get(path, path.removeprefix("docs/") if path.startswith("docs/") else path)
        if files.get_file_from_path(path):
            return f"{mark}[{text}]({path}{hash_}{anchor})"
        if not (ROOT / path).exists():
            return match.group()  # for MkDocs to complain about
        return f"[{text}]({config.repo_url}/blob/main/{path}{hash_}{anchor})" if config.repo_url else text

    return _outside_code(markdown, lambda text: LINK.sub(replace, text))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings name what they speak of as Sphinx does; the roles themselves are not for readers."""
    return re.sub(r":(?:func|class|mod|meth|attr|data|obj):(?=<code>)", "", html)


def diagram_name(source: str) -> str:
    """Where the picture of a diagram lies: docs/draw_diagrams.py makes it."""
    return f"diagrams/{sha256(source.encode()).hexdigest()[:12]}.svg"


def _picture_of(source: str, files: Files) -> str:
    """A picture in place of a Mermaid diagram, which browsers could draw only with a script from elsewhere."""
    name = diagram_name(source)
    return f"![Diagram]({name})" if files.get_file_from_path(name) else f"```text\n{source}```"


def missing_modules(reference: str) -> str:
    """Sections for the public modules that the API reference does not name yet."""
    sections = ""
    for init in sorted([*PACKAGE.glob("*/__init__.py"), *PACKAGE.glob("[a-z]*.py")]):
        name = f"overlock.{init.parent.name if init.stem == '__init__' else init.stem}"
        if re.search(r"^__all__ =", init.read_text(), flags=re.MULTILINE) and f"::: {name}\n" not in reference:
            sections += "" if name in FORMER else f"\n## {name}\n\n::: {name}\n"
    return sections


def missing_commands(guide: str) -> str:
    """Rows for the commands that the guide does not name yet, with what their help says."""
    rows = [
        f"| `overlock {name}` | {command.summary} | |\n"
        for name, command in COMMANDS.items()
        if f"| `overlock {name}` |" not in guide
    ]
    return "".join(["\n| more commands | what | |\n| --- | --- | --- |\n", *rows]) if rows else ""


COMPLETED = {"reference.md": missing_modules, "commands.md": missing_commands}
"""Pages that must name everything, and what adds to them what they lack."""


def _normalise(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Change a text but for its blocks of code."""
    pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(piece if piece.startswith("```") else change(piece) for piece in pieces)
