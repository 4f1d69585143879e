"""Commands side by side, each within its limit of time and in a process of its own.

One that crashes or hangs costs itself only. What it was doing is in its output: at its limit it gets SIGINT,
as by Ctrl-C, so that it can save and report; then SIGABRT, at which Python's faulthandler writes where every
thread is; then SIGTERM and SIGKILL.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

# Signals to a command that is over its limit, and seconds until the next.
STAGES = (("SIGINT", 8.0), ("SIGABRT", 4.0), ("SIGTERM", 2.0), ("SIGKILL", 60.0))
GRACE = sum(seconds for _, seconds in STAGES[:-1])  # within these it has ended
MISSING = 127  # the exit status of a command that cannot be started, as a shell has it


@dataclass(frozen=True)
class Job:
    """A command that is to be run within a limit.

    Attributes:
        name: what reports call it.
        seconds: its limit.
        variables: of the environment, beside those that are there.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Attributes:
        status: its exit status; negative, the signal that ended it.
        late: whether it was stopped at its limit, or with all others.
    """

    job: Job
    status: int
    seconds: float
    late: bool
    output: str

    @property
    def how(self) -> str:
        """How it ended, in words; nothing where it ended well."""
        if self.late:
            return f"stopped after {self.seconds:.0f} s"
        if self.status < 0:
            return f"crashed: {signal.Signals(-self.status).name}"
        return f"exit status {self.status}" if self.status else ""


Follow = Callable[[str], None]


class _Running:
    """A command under way; its output goes to a file, which no pipe can block."""

    def __init__(self, job: Job, folder: Path, limit: float) -> None:
        self.job, self._began = job, time.monotonic()
        self._signals = deque(STAGES)
        self._next = limit
        handle, name = tempfile.mkstemp(dir=folder)
        self._path = Path(name)
        with os.fdopen(handle, "wb") as output:
            self._process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **job.variables},
                start_new_session=True,  # or signals would not reach what it has started itself
            )
        self._followed = 0

    def has_ended(self) -> bool:
        """Whether it has; sends what signal is due if not."""
        if self._process.poll() is not None:
            self._send("SIGKILL")  # to what it may have left running
            return True
        if time.monotonic() >= self._next and self._signals:
            name, seconds = self._signals.popleft()
            self._send(name)
            self._next = time.monotonic() + seconds
        return False

    def stop(self) -> None:
        """It is over its limit from now on, if it was not yet."""
        if not self._is_late():
            self._next = time.monotonic()

    def _is_late(self) -> bool:
        return len(self._signals) < len(STAGES)

    def kill(self) -> None:
        """Ends it at once."""
        self._send("SIGKILL")
        self._process.wait()

    def _send(self, name: str) -> None:
        with suppress(ProcessLookupError, PermissionError):  # there is nobody left
            os.killpg(self._process.pid, getattr(signal, name))

    def follow(self, to: Follow) -> None:
        """Hands on what was written since the last time."""
        with self._path.open("rb") as file:
            file.seek(self._followed)
            new = file.read()
        self._followed += len(new)
        if new:
            to(new.decode(errors="replace"))

    def ended(self) -> Ended:
        output = self._path.read_text(encoding="utf-8", errors="replace")
        self._path.unlink()
        seconds = time.monotonic() - self._began
        return Ended(self.job, self._process.returncode, seconds, self._is_late(), output)


def run(
    jobs: Iterable[Job],
    workers: int,
    deadline: float,
    ended: Callable[[Ended], Iterable[Job]],
    stop: Event | None = None,
    follow: Follow | None = None,
    pause: float = 0.05,
) -> list[Job]:
    """Run jobs in their order, so many at a time.

    Args:
        deadline: time.monotonic() at which all are over their limit.
        ended: is told of each that has ended; what it returns is run next.
        stop: once it is set, the deadline is now. An exception could come while `ended` writes a report.
        follow: gets the output of all as it comes.
        pause: seconds between two looks.

    Returns:
        Those that were not begun.
    """
    waiting, running = deque(jobs), list[_Running]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while running or (waiting and time.monotonic() < deadline):
                while waiting and len(running) < workers and time.monotonic() < deadline:
                    job = waiting.popleft()
                    limit = min(time.monotonic() + job.seconds, deadline)
                    try:
                        running.append(_Running(job, Path(folder), limit))
                    except OSError as error:
                        waiting.extendleft(ended(Ended(job, MISSING, 0.0, False, f"{error}\n")))
                time.sleep(pause)
                if stop is not None and stop.is_set() and time.monotonic() < deadline:
                    deadline = time.monotonic()
                    for one in running:
                        one.stop()
                for one in list(running):
                    over = one.has_ended()
                    if follow is not None:
                        one.follow(follow)
                    if over:
                        running.remove(one)
                        waiting.extendleft(reversed(list(ended(one.ended()))))
        finally:
            for one in running:
                one.kill()
    return list(waiting)
