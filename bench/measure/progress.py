"""What is being done, shown while it is: by rich where that is installed and there is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from .clocks import Tell


@contextmanager
def showing() -> Iterator[Tell]:
    """A function that is told what is being done and which share of it is over."""
    if find_spec("rich") is None or not sys.stdout.isatty():
        yield _lines()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def tell(what: str, share: float) -> None:
            bar.update(task, description=what, completed=share)

        yield tell


def _lines() -> Tell:
    """A line whenever something else begins."""
    last = ""

    def tell(what: str, share: float) -> None:
        nonlocal last
        if what != last:
            print(f"... {what}", flush=True)
            last = what

    return tell
