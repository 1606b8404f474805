"""The one part of the build that pyproject.toml cannot say: the README as a package index shows it.

An index knows nothing of the files beside the README, so that its links must be whole addresses. Where the source lies
is told by the environment variable OVERLOCK_URL, say ``OVERLOCK_URL=https://HOST/NAME/overlock python -m build``.
"""

import os
import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).parent / "README.md"
VERSION = Path(__file__).parent / "src" / "overlock" / "version.py"


def with_whole_links(text: str, address: str, tag: str) -> str:
    """The text with its links to files of the repository as links to ``address``."""

    def replace(match: re.Match) -> str:
        mark, words, target = match.groups()
        return f"{mark}[{words}]({address}/{'raw' if mark else 'blob'}/{tag}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", replace, text)


version = re.search(r'__version__ = "(.+)"', VERSION.read_text()).group(1)
url = os.environ.get("OVERLOCK_URL", "").rstrip("/")
text = README.read_text()
setup(
    long_description=with_whole_links(text, url, f"v{version}") if url else text,
    long_description_content_type="text/markdown",
    project_urls={"Repository": url} if url else {},
)
