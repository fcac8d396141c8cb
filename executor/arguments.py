"""The argument parser of every command: an error is one line, with exit code 2."""

from __future__ import annotations

import argparse
import sys

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with exit code 2."""

    def error(self, message: str) -> None:  # type: ignore[override]  # it never returns
        """Print the message and leave."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)
