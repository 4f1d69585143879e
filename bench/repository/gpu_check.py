"""Groups of tests on a GPU, each in a process of its own, reported as they end.

A kernel that reaches outside of its memory, or hangs, takes its process with it: another one goes on behind
the test in which that was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Event

from . import gpu_log, gpu_parts, outcomes, pool

ENDED = (0, 1, 5)  # exit codes of pytest where all passed, some failed, none was there
RESTARTS = 6  # of a group


class Check:
    """Runs groups of tests; the report is right whenever it is read."""

    def __init__(self, report: Path, folder: Path, log: gpu_log.Log, stop: Event) -> None:
        """`report`: the JUnit file; `folder`: has the outcomes of each group."""
        self.groups: dict[str, outcomes.Group] = {}  # those that have ended, or were begun anew
        self.notes: list[str] = []  # what does not run here
        self._report, self._folder, self._log, self._stop = report, folder, log, stop

    def run(self, jobs: Sequence[pool.Job], workers: int, deadline: float) -> list[str]:
        """What is wrong, in sentences."""
        self._log(f"{len(jobs)} groups of tests, {workers} at a time")
        left = pool.run(jobs, workers, deadline, self._ended, self._stop)
        groups = list(self.groups.values())
        for line in ("", *outcomes.summary(groups)):
            self._log(line)
        wrong = [*self.notes, *(f"{group.name}: {how}" for group in groups for how in group.ends)]
        if failed := sum(group.count()["failed"] for group in groups):
            wrong.append(f"{failed} tests failed: see above, and {self._report.name}")
        if left:
            wrong.append(f"no time was left for {', '.join(job.name for job in left)}")
        return wrong

    def _ended(self, one: pool.Ended) -> Iterable[pool.Job]:
        group = self.groups.setdefault(one.job.name, outcomes.Group(one.job.name))
        group.seconds += one.seconds
        before = len(group.tests)
        died = self._took_tests(one, group) if gpu_parts.has_outcomes(one.job) else self._took(one, group)
        outcomes.write(list(self.groups.values()), self._report)
        self._log(f"{group.name}: {outcomes.counted(group.count())}, {group.seconds:.0f} s")
        if not group.is_well:
            self._log.output(f"{gpu_log.shortened(one.output)}\n")
        again = died and len(group.tests) > before and len(group.ends) <= RESTARTS
        return [one.job] if again and not self._stop.is_set() else []

    def _took_tests(self, one: pool.Ended, group: outcomes.Group) -> bool:
        """Takes over what a process has done; whether it died before its last test."""
        path = gpu_parts.outcomes_of(self._folder, one.job.name)
        died_in = outcomes.close(path, one.how)
        group.tests = outcomes.read(path)
        if not one.late and one.status in ENDED:
            return False
        lost = re.search(r"the GPU is lost to this process: .*", one.output)
        group.ends.append((lost[0] if lost else one.how) + (f" in {died_in}" if died_in else ""))
        return True

    def _took(self, one: pool.Ended, group: outcomes.Group) -> bool:
        """Takes a command as one test."""
        refused = re.search(r".*(not supported|LibraryNotLoaded).*", one.output)
        if one.how and refused:
            self.notes.append(f"{one.job.name} does not run here: {refused[0].strip()}")
            group.tests = [outcomes.Outcome(one.job.name, "skipped", one.seconds)]
            return False
        brief = f"{one.how}: {gpu_log.last_line(one.output)}"
        text = gpu_log.shortened(one.output, 8000)
        what = "failed" if one.how else "passed"
        group.tests = [outcomes.Outcome(one.job.name, what, one.seconds, text, brief)]
        return False
