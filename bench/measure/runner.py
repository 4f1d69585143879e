"""Cases measured one after the other: what is there is written after each, whatever becomes of the next."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..env import machine
from ..report.results import Measured, Results, assemble, save
from . import ceilings, host
from .case import Case, run
from .clocks import Effort, Tell
from .worker import Worker, direct

INTERRUPTED = 130  # the exit status of what Ctrl-C ends
T = TypeVar("T")


class Log:
    """Prints with the time since the start: a run that is cut short says how far it came."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __call__(self, text: str) -> None:
        print(f"[{self.seconds:4.0f} s] {text}", flush=True)


class Run:
    """A run and what it has found so far.

    Attributes:
        ceil: the machine's own limits.
        done: the cases that were measured.
        more: failures, what was left out, and what else stands in the file.
        interrupted: whether the user ended it (Ctrl-C).
    """

    def __init__(
        self,
        head: machine.Head,
        device: torch.device,
        path: Path | None,
        say: Callable[[str], None],
        tell: Tell = lambda what, share: None,
        finish: Callable[[Results], None] = lambda whole: None,
        worker: Worker | None = None,
    ) -> None:
        """Nothing is measured yet.

        Args:
            path: where results are written, if they are.
            finish: adds to them what follows from them.
            worker: measures in another process, so that what hangs or crashes costs that case only.
        """
        self.head, self.device, self.path, self.say, self.tell = head, device, path, say, tell
        self._finish, self._call = finish, worker.call if worker else direct
        self.ceil: dict[str, Any] = {}
        self.done: list[Measured] = []
        self.more: dict[str, Any] = {"host": [], "failures": [], "left_out": []}
        self.interrupted = False
        self._readings: list[dict[str, float]] = []

    def guarded(self, name: str, work: Callable[[], T]) -> T | None:
        """What `work` returns, or None after noting its failure, or that the user ended it."""
        try:
            return work()
        except KeyboardInterrupt:
            self.interrupted = True
        except Exception as error:  # the other cases must still run
            traceback.print_exc()
            self.say(f"FAILED: {name}")
            self.more["failures"].append({"case": name, "error": f"{type(error).__name__}: {error}"})
        return None

    def ceilings(self) -> None:
        self.tell("memory bandwidth", 0.0)
        self.ceil = self.guarded("ceilings", lambda: self._call(ceilings.measure, self.device)) or {}

    def host(self) -> None:
        self.more["host"] = self.guarded("host time", lambda: self._call(host.measure, self.device)) or []

    def measure(self, case: Case, effort: Effort) -> Measured | None:
        """Measure a case and save the run; None where it broke, or the user ended it too early."""
        tell = () if self._call is not direct else (self.tell,)  # which only this process can
        measured = self.guarded(case.title, lambda: self._call(run, case, self.device, effort, *tell))
        if measured is not None:
            self.done.append(measured)
            self.interrupted |= measured.incomplete
        if machine.on_gpu(self.device) and (reading := machine.sensors()):
            self._readings.append(reading)
        self.save()
        return measured

    def whole(self) -> Results:
        """The run as the file has it."""
        whole = assemble(self.head, self.ceil, self.done, **self.more, incomplete=self.interrupted)
        if whole.device and self._readings:
            clocks = [reading["mhz"] for reading in self._readings]
            whole.device["clock_mhz_min_max"] = [min(clocks), max(clocks)]
            whole.device["power_w"] = max(reading["watt"] for reading in self._readings)
        self._finish(whole)
        return whole

    def save(self) -> Results:
        whole = self.whole()
        if self.path is not None:
            save(whole, self.path)
        return whole

    def wrong(self) -> list[str]:
        """Our own methods that did not pass: of others it is news, of ours a defect."""
        return [line for case in self.done for line in case.wrong]

    def status(self) -> int:
        """The exit status."""
        if self.interrupted:
            return INTERRUPTED
        return 1 if self.more["failures"] or self.wrong() or not self.done else 0
