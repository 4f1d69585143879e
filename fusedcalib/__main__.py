"""python -m fusedcalib COMMAND [arguments of the command]. The commands stand in bench/cli.py."""

from __future__ import annotations

import sys

from .bench import cli


def main(arguments: list[str] | None = None) -> int:
    """Runs a command of those that are installed; returns its exit code."""
    return cli.main(arguments, cli.USERS)


if __name__ == "__main__":
    sys.exit(main())
