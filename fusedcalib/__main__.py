"""python -m fusedcalib COMMAND [arguments of the command]. The commands stand in bench/commands.py."""

from __future__ import annotations

import sys
from importlib import import_module

from .bench.commands import COMMANDS


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] in (["-h"], ["--help"]):
        lines = [f"  {name:<8}{about}" for name, (_, about) in COMMANDS.items()]
        print("\n".join(["python -m fusedcalib COMMAND [arguments]; each has --help", *lines]))
        return 0
    if not given or given[0] not in COMMANDS:
        said = f"there is no command {given[0]!r}" if given else "a command is missing"
        print(f"fusedcalib: {said}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    code: int = import_module(f"fusedcalib.{COMMANDS[given[0]][0]}").main(given[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
