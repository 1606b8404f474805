"""The command ``overlock``: parse, call, show. Each sub-command is a file, and imports what it needs when it runs."""

from overlock.cli.main import main, make_parser

__all__ = ["main", "make_parser"]
