"""How busy other programs keep the machine, so that disturbed samples can be told."""

from __future__ import annotations

import os
import time
from pathlib import Path

TICK = 0.01  # seconds, in which the system counts
GLANCE = 20 * TICK


class Load:
    """How much of the machine other programs (and other virtual machines) take."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start = self._read()

    def of_others(self) -> float:
        """Share of all cores since the last `restart`; 0 where the system does not tell."""
        busy, own, total = (b - a for a, b in zip(self._start, self._read(), strict=True))
        # A tick is given whole to whoever has the core at its end: no more than that is known.
        others = busy - own - 2 * TICK
        return max(0.0, others) / total if total > 0 else 0.0

    def wait_until_quiet(self, share: float, deadline: float) -> None:
        """Return once others take no more than `share`, or at the deadline (of time.monotonic)."""
        while time.monotonic() < deadline:
            self.restart()
            time.sleep(GLANCE)
            if self.of_others() <= share:
                return

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds of CPU time: used by anyone, used by this process, used or idle."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return 0.0, 0.0, 0.0
        ticks = [float(value) / os.sysconf("SC_CLK_TCK") for value in fields]
        return sum(ticks) - ticks[3] - ticks[4], time.process_time(), sum(ticks)
