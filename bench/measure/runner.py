"""Cases measured one after the other: what is there is written after each, whatever becomes of the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from ..env import machine
from ..report.records import Failure
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
    """A run, what it has found so far, and whether the user ended it (Ctrl-C: results.incomplete)."""

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
        self.results = assemble(head, {}, [])
        self.device, self.path, self.say, self.tell = device, path, say, tell
        self._finish, self._call = finish, worker.call if worker else direct
        self._readings: list[dict[str, float]] = []

    @property
    def interrupted(self) -> bool:
        return self.results.incomplete

    def guarded(self, name: str, work: Callable[[], T]) -> T | None:
        """What `work` returns, or None after noting its failure, or that the user ended it."""
        try:
            return work()
        except KeyboardInterrupt:
            self.results.incomplete = True
        except Exception as error:  # the other cases must still run
            self.results.failures.append(Failure.of(name, error))
            self.say(f"FAILED: {name}")
        return None

    def ceilings(self) -> None:
        self.tell("memory bandwidth", 0.0)
        found = self.guarded("ceilings", lambda: self._call(ceilings.measure, self.device))
        self.results.ceil = found or {}

    def host(self) -> None:
        self.results.host = self.guarded("host time", lambda: self._call(host.measure, self.device)) or []

    def measure(self, case: Case, effort: Effort) -> Measured | None:
        """Measure a case and save the run; None where it broke, or the user ended it too early."""
        tell = () if self._call is not direct else (self.tell,)  # which only this process can
        measured = self.guarded(case.title, lambda: self._call(run, case, self.device, effort, *tell))
        if measured is not None:
            self.results.cases.append(measured)
            self.results.incomplete |= measured.incomplete
        if machine.on_gpu(self.device) and (reading := machine.sensors()):
            self._readings.append(reading)
        self.save()
        return measured

    def save(self) -> Results:
        """The run as the file has it."""
        whole = self.results
        whole.add_bandwidths()
        if whole.device and self._readings:
            clocks = [reading["mhz"] for reading in self._readings]
            whole.device["clock_mhz_min_max"] = [min(clocks), max(clocks)]
            whole.device["power_w"] = max(reading["watt"] for reading in self._readings)
        self._finish(whole)
        if self.path is not None:
            save(whole, self.path)
        return whole

    def status(self) -> int:
        """The exit status."""
        if self.interrupted:
            return INTERRUPTED
        return 1 if self.results.failures or self.results.wrong or not self.results.cases else 0
