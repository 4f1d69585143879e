"""What a machine with a GPU can tell of this package, in three parts of at most eight minutes each.

check: the kernel tests as compiled, over all cores; the tests around them; the memory checkers.
measure: a profile of the kernels, then the benchmark suite.
explain: variants of the kernels, a trace, and what Nsight Compute counts.

bench/gpu.sh runs it. Everything goes into one folder as it comes: gpu.log ends with what is wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event
from types import FrameType

from .. import bootstrap
from . import gpu_check, gpu_log, gpu_parts, pool

SECONDS = 460.0  # of a part
INTERRUPTED = 130
GPU = (
    "import torch; here = torch.cuda.is_available(); print('yes' if here else 'no', "
    "torch.cuda.get_device_name() if here else f'torch {torch.__version__} sees none')"
)


class Work:
    """A run of one or more parts."""

    def __init__(self, out: Path, python: str, only: str = "", interpreted: bool = False) -> None:
        """`only`: a regular expression for groups of tests; `interpreted`: a trial without a GPU."""
        self.out, self.python, self.only, self.interpreted = out, python, only, interpreted
        self.log = gpu_log.Log(out / "gpu.log")
        self.wrong: list[str] = []  # what is, in sentences
        self.stop = Event()  # set when the user ends it

    def fault(self, sentence: str) -> None:
        self.wrong.append(sentence)
        self.log(sentence)

    # -- the parts

    def check(self, seconds: float) -> None:
        """The tests, in a process for each group, as many at a time as there are cores."""
        deadline = time.monotonic() + seconds - pool.GRACE
        self.environment()
        if not self.interpreted and not gpu_parts.tool("compute-sanitizer", self.python):
            self.fault("compute-sanitizer is not here: no memory is checked")
        if not self.sees_gpu():
            return
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with tempfile.TemporaryDirectory() as folder:
            jobs = gpu_parts.checks(self.python, Path(folder), self.interpreted)
            jobs = [job for job in jobs if re.search(self.only, job.name)]
            check = gpu_check.Check(self.out / "check.xml", Path(folder), self.log, self.stop)
            self.wrong += check.run(jobs, cores, deadline)

    def environment(self) -> None:
        """Versions and devices, for a report."""
        found = self.asked("-m", "fusedcalib", "env", "--json")
        if found is not None:
            (self.out / "env.json").write_text(found, encoding="utf-8")

    def sees_gpu(self) -> bool:
        """Whether torch does, or none is needed; says which."""
        found = self.asked("-c", GPU)
        answer, _, name = gpu_log.last_line(found or "").partition(" ")
        self.log(f"GPU: {name or 'not known'}")
        if answer == "yes" or self.interpreted:
            return True
        self.fault("there is no GPU here that torch sees: nothing was run")
        return False

    def asked(self, *arguments: str) -> str | None:
        """What Python prints; None, and a fault, where it fails."""
        command = [self.python, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
        except subprocess.TimeoutExpired:
            self.fault(f"{' '.join(command)} took more than 120 s")
            return None
        if done.returncode == 0:
            return done.stdout
        self.fault(f"{' '.join(command)} failed: {gpu_log.last_line(done.stderr)}")
        return None

    def measure(self, seconds: float) -> None:
        """The profile, then the suite in the time that is left."""
        deadline = time.monotonic() + seconds - pool.GRACE
        if self.sees_gpu():
            self.commands([gpu_parts.profile(self.python, self.out, 0.3 * seconds)], deadline)
            left = deadline - time.monotonic()
            self.commands([gpu_parts.suite(self.python, self.out, left)], deadline)

    def explain(self, seconds: float) -> None:
        """Times variants of the kernels, writes a trace, reads counters."""
        deadline = time.monotonic() + seconds - pool.GRACE
        counters = gpu_parts.counters(self.python)
        if not counters:
            self.fault("ncu is not here: no counter of a kernel is read")
        if self.sees_gpu():
            variants = gpu_parts.variants(self.python, self.out, seconds)
            self.commands([variants, gpu_parts.trace(self.python, self.out)], deadline)
            self.commands(counters, deadline, self.out / "ncu.txt")

    def commands(self, jobs: Sequence[pool.Job], deadline: float, path: Path | None = None) -> None:
        """One after the other, shown as they go; with `path` their output goes there."""
        if path is not None and jobs:
            path.unlink(missing_ok=True)
        apart = gpu_log.Log(path) if path is not None else None

        def ended(one: pool.Ended) -> Iterable[pool.Job]:
            self.log(f"== {one.job.name}: {one.how or 'done'}, {one.seconds:.0f} s")
            if apart is not None:
                apart.output(f"== {one.job.name}\n{one.output}\n")
            if one.how:
                self.wrong.append(f"{one.job.name}: {one.how}: {gpu_log.last_line(one.output)}")
            return ()

        follow = self.log.follow if apart is None else None
        for job in pool.run(jobs, 1, deadline, ended, self.stop, follow):
            self.fault(f"no time was left for {job.name}")

    # -- all of it

    def run(self, parts: Sequence[str]) -> int:
        """Runs the parts in turn; returns the exit status."""
        began = time.time()
        for part in parts:
            seconds = float(os.environ.get(f"{part.upper()}_SECONDS", SECONDS))
            self.log(f"== {part}: at most {seconds:.0f} s, {time.strftime('%Y-%m-%d %H:%M:%S')}")
            getattr(self, part)(seconds)
            if self.stop.is_set():
                self.fault(f"{part} was interrupted")
                break
        return self.say(began)

    def say(self, began: float) -> int:
        """Files and faults; returns the exit status."""
        self.log(f"\nin {self.out}:")
        for path in sorted(self.out.iterdir()):
            if path.is_file() and path.stat().st_mtime >= began - 1:
                size = path.stat().st_size
                self.log(f"  {path.name}, {size / 1024:,.0f} KB")
                if size > gpu_log.MOST:
                    self.wrong.append(f"{path.name} is larger than 16 MiB")
        for sentence in dict.fromkeys(self.wrong):
            self.log(f"FAILED: {sentence}")
        if not self.wrong:
            self.log("all is well")
        return INTERRUPTED if self.stop.is_set() else 1 if self.wrong else 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ends all that runs, so that it reports; the second time at once."""
        self.stop.set()
        signal.signal(number, signal.default_int_handler)


PARTS = ("check", "measure", "explain")


def main(options: argparse.Namespace) -> int:
    if unknown := [part for part in options.part if part not in PARTS]:
        raise ValueError(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    out = Path(os.environ.get("OUT") or bootstrap.ROOT / "bench" / "results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    python, variables = bootstrap.prepare("pytest")
    os.environ.update(variables)
    os.environ["PYTHONUNBUFFERED"] = "1"  # or a log would lose its end when the time is over
    if options.interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    with suppress(ImportError):  # a crash should leave its reason, and not the memory of a GPU's process
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(bootstrap.ROOT)  # -m puts the current folder first, and bench has names of other modules
    one = Work(out, python, options.only, options.interpreted)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, one.on_signal)
    return one.run(options.part or PARTS)
