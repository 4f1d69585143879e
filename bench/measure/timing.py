"""Fair timing: methods take turns in rotated rounds, and only ratios within a round are compared.

A machine's speed drifts (clocks, neighbours), so a millisecond of one minute is not a millisecond
of the next. On a CPU every sample stands between two samples of an anchor method; where these two
disagree, or other programs were at work in that round, the machine was disturbed: the sample is
dropped and counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..env import machine
from ..report.records import Spread
from .load import Load

Step = Callable[[], object]
Sampler = Callable[[], float]  # runs a method's step once or a few times, returns seconds a step

BRACKET_TOLERANCE = 0.10
OTHERS_TOLERANCE = 0.08
ENOUGH = 5  # quiet samples, below which the disturbed ones must serve too
FLUSH_BYTES = 256 * 2**20  # well over any GPU's L2 cache
QUEUE_LIMIT = 900  # launches that fit behind a sleeping kernel; CUDA's queue holds about 1024


@dataclass(frozen=True)
class Sample:
    """One sample of a method: its time, the same in units of its brackets, whether it was quiet."""

    seconds: float
    relative: float
    quiet: bool = True


@dataclass
class Rounds:
    """The samples of each method, one for each round."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    interrupted: bool = False  # by the user, before the last round was over

    def add(self, name: str, sample: Sample) -> None:
        self.samples.setdefault(name, []).append(sample)

    def without(self, names: Container[str]) -> Rounds:
        """These rounds, some methods left out."""
        kept = {name: samples for name, samples in self.samples.items() if name not in names}
        return Rounds(kept, self.interrupted)

    def kept(self, name: str) -> int:
        return sum(sample.quiet for sample in self.samples.get(name, []))

    def dropped(self, name: str) -> int:
        return len(self.samples.get(name, [])) - self.kept(name)

    def time(self, name: str) -> Spread | None:
        """Seconds of a step."""
        return _spread([(sample.seconds, sample.quiet) for sample in self.samples.get(name, [])])

    def ratio(self, name: str, to: str) -> Spread | None:
        """The ratio of two methods within a round, over the rounds in which both were quiet."""
        pairs = zip(self.samples.get(name, []), self.samples.get(to, []), strict=False)
        return _spread([(a.relative / b.relative, a.quiet and b.quiet) for a, b in pairs])


def _spread(values: list[tuple[float, bool]]) -> Spread | None:
    """The spread of the quiet values; of all, and marked so, where the machine was hardly ever quiet."""
    quiet = [value for value, kept in values if kept]
    if len(quiet) >= min(ENOUGH, len(values)):
        return Spread.of(quiet)
    return Spread.of([value for value, _ in values], disturbed=True)


def interleave(
    samplers: dict[str, Sampler],
    *,
    rounds: int,
    seconds: float,
    anchor: str | None = None,
    tell: Callable[[float], None] = lambda share: None,
) -> Rounds:
    """Run every method once a round, in rotated order, for `rounds` rounds or `seconds` at most.

    With an `anchor`, one of the methods, each sample of another is bracketed by two of the anchor,
    and in the first half of the time a disturbed round is followed by waiting for quiet.
    At least one round is always run. `tell` is told which share of the rounds, or of the time, is over.
    An interrupt (Ctrl-C) ends the rounds: what was measured until then is returned.
    """
    out = Rounds()
    load = Load()
    names = [name for name in samplers if name != anchor]
    rounds = rounds if samplers else 0
    start = time.monotonic()
    try:
        if rounds:
            tell(0.0)
        for turn in range(rounds):
            if turn and time.monotonic() > start + seconds:
                break
            shift = turn % max(len(names), 1)
            order = names[shift:] + names[:shift]
            if anchor is None:
                for name in order:
                    out.add(name, Sample(taken := samplers[name](), taken))
            else:
                if not turn or not out.samples[anchor][-1].quiet:
                    load.wait_until_quiet(OTHERS_TOLERANCE, start + seconds / 2)
                _bracketed(out, samplers, order, anchor, load)
            tell(max((turn + 1) / rounds, min(1.0, (time.monotonic() - start) / max(seconds, 1e-9))))
    except KeyboardInterrupt:
        out.interrupted = True
    return out


def _bracketed(out: Rounds, samplers: dict[str, Sampler], order: list[str], anchor: str, load: Load) -> None:
    """One round in which each sample stands between two of the anchor."""
    load.restart()
    anchors, taken = [samplers[anchor]()], []
    for name in order:
        taken.append(samplers[name]())
        anchors.append(samplers[anchor]())
    quiet = load.of_others() <= OTHERS_TOLERANCE
    for name, seconds_of, before, after in zip(order, taken, anchors, anchors[1:], strict=False):
        steady = abs(after - before) <= BRACKET_TOLERANCE * min(before, after)
        out.add(name, Sample(seconds_of, 2 * seconds_of / (before + after), quiet and steady))
    out.add(anchor, Sample(float(np.median(anchors)), 1.0, quiet))


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, for work of many small operations: threads that wait for each other slow it down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def wall_sampler(
    step: Step, device: torch.device, repeat: int = 1, settle: bool = False, fresh: Step | None = None
) -> Sampler:
    """Host and device together: what a user waits for.

    With `settle` a step is taken first that is not counted: what ran before left other caches. `fresh`
    comes before each sample, and is not counted either.
    """

    def sample() -> float:
        if fresh:
            fresh()
        if settle:
            step()
        machine.synchronize(device)
        start = time.perf_counter()
        for _ in range(repeat):
            step()
        machine.synchronize(device)
        return (time.perf_counter() - start) / repeat

    return sample


def device_sampler(
    step: Step,
    device: torch.device,
    *,
    sleep_seconds: float,
    repeat: int,
    flush: bool,
    fresh: Step | None = None,
) -> Sampler:
    """Time on the GPU alone: steps are queued behind a sleeping kernel, between CUDA events.

    The sleep must outlast the host's work, or gaps of the host are counted as the device's. With
    `flush`, a buffer larger than the L2 cache is overwritten before each step; `fresh` comes before each
    sample.
    """
    buffer = torch.empty(FLUSH_BYTES if flush else 0, dtype=torch.uint8, device=device)
    spans = [1] * repeat if flush else [repeat]  # steps between two events

    def sample() -> float:
        Event: Any = torch.cuda.Event
        events = [[Event(enable_timing=True) for _ in range(2)] for _ in spans]
        if fresh:
            fresh()
        torch.cuda.synchronize(device)
        _sleep(device, sleep_seconds)
        for (start, stop), span in zip(events, spans, strict=True):
            if flush:
                buffer.zero_()
            start.record()
            for _ in range(span):
                step()
            stop.record()
        torch.cuda.synchronize(device)
        milliseconds = sum(float(start.elapsed_time(stop)) for start, stop in events)
        return milliseconds * 1e-3 / repeat

    return sample


def host_seconds(device: torch.device, step: Step, repeats: int = 50) -> float:
    """Median time until `step` returns, the device kept busy so that it never waits for the host.

    Without a GPU this is the whole step, arithmetic included.
    """
    gpu = machine.on_gpu(device)
    taken = []
    for _ in range(repeats):
        machine.synchronize(device)
        if gpu:
            _sleep(device, 0.02)
        start = time.perf_counter_ns()
        step()
        taken.append(time.perf_counter_ns() - start)
    machine.synchronize(device)
    return float(np.median(taken)) * 1e-9


def _sleep(device: torch.device, seconds: float) -> None:
    """Keep the GPU from starting what is queued next, for at least as long."""
    # Counted in cycles: at the highest clock of the GPU, or else at more than any has.
    kilohertz = getattr(torch.cuda.get_device_properties(device), "clock_rate", 0) or 2_500_000
    torch.cuda._sleep(int(seconds * 1e3 * kilohertz))  # type: ignore[no-untyped-call]


def repeats_for(step_seconds: float, at_least: float = 0.005) -> int:
    """How many steps make a sample long enough for the clock and for the scheduler's noise."""
    return max(1, math.ceil(at_least / max(step_seconds, 1e-7)))
