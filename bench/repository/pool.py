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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event

# Signals to a command that is over its limit, and seconds until the next.
STAGES = (("SIGINT", 8.0), ("SIGABRT", 4.0), ("SIGTERM", 2.0), ("SIGKILL", 60.0))
GRACE = sum(seconds for _, seconds in STAGES[:-1])  # within these it has ended
MISSING = 127  # the exit status of a command that cannot be started, as a shell has it


@dataclass(frozen=True)
class Job:
    """A command that is to be run within a limit."""

    name: str  # what reports call it
    command: tuple[str, ...]
    seconds: float  # its limit
    variables: Mapping[str, str] = field(default_factory=dict)  # of the environment, beside those there


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    job: Job
    status: int  # its exit status; negative, the signal that ended it
    seconds: float
    late: bool  # whether it was stopped at its limit, or with all others
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
    waiting, running = deque(jobs), set[Future[Ended]]()
    stopped, killed = stop or Event(), Event()

    def can_begin() -> bool:
        return bool(waiting) and time.monotonic() < deadline and not stopped.is_set()

    with ThreadPoolExecutor(workers) as threads:
        try:
            while running or can_begin():
                while len(running) < workers and can_begin():
                    job = waiting.popleft()
                    running.add(threads.submit(_run, job, deadline, stopped, killed, follow, pause))
                over, running = wait(running, return_when=FIRST_COMPLETED)
                for one in over:
                    waiting.extendleft(reversed(list(ended(one.result()))))
        finally:
            killed.set()
    return list(waiting)


def _run(
    job: Job, deadline: float, stopped: Event, killed: Event, follow: Follow | None, pause: float
) -> Ended:
    """Runs a command; its output goes to a file, which no pipe can block."""
    began = time.monotonic()
    signals, due = deque(STAGES), min(began + job.seconds, deadline)
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **job.variables},
                start_new_session=True,  # or signals would not reach what it has started itself
            )
        except OSError as error:
            return Ended(job, MISSING, 0.0, False, f"{error}\n")
        text = b""
        while not killed.is_set():
            over = process.poll() is not None
            new = os.pread(output.fileno(), os.fstat(output.fileno()).st_size - len(text), len(text))
            text += new
            if new and follow is not None:
                follow(new.decode(errors="replace"))
            if over:
                break
            if stopped.is_set() and len(signals) == len(STAGES):
                due = 0.0
            if signals and time.monotonic() >= due:
                name, seconds = signals.popleft()
                _send(process, name)
                due = time.monotonic() + seconds
            time.sleep(pause)
        _send(process, "SIGKILL")  # also to what it may have left running
        status = process.wait()
    late = len(signals) < len(STAGES)
    return Ended(job, status, time.monotonic() - began, late, text.decode(errors="replace"))


def _send(process: subprocess.Popen[bytes], name: str) -> None:
    with suppress(ProcessLookupError, PermissionError):  # there is nobody left
        os.killpg(process.pid, getattr(signal, name))
