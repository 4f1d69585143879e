"""What a step costs besides time: memory at its peak; on a GPU host time and kernel launches too."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ..env import machine
from .timing import QUEUE_LIMIT, Step, host_seconds

LONGEST_SLEEP = 0.5  # seconds; a method with more host work is timed by the wall clock only


@dataclass(frozen=True)
class Probe:
    """Numbers of one step of a method."""

    host_us: float | None
    launches: int | None
    peak_extra_bytes: int | None


def measure(step: Step, device: torch.device) -> Probe:
    """Probe a warm step."""
    if not machine.on_gpu(device):
        return Probe(None, None, _peak_on_cpu(step))
    return Probe(
        host_us=1e6 * host_seconds(device, step, repeats=20),
        launches=len(captured(step, device)) or None,  # None where the profiler sees none
        peak_extra_bytes=_peak(step, device),
    )


def queue(probed: Probe, flush: bool) -> dict[str, Any] | None:
    """How many steps to queue, and the sleep that hides their host time; None if they do not fit.

    A queue that is full makes the host wait for the device: the gaps of the host would be counted.
    """
    each = (probed.launches or 1) + 4 * flush + 1  # a flush, and the events, are entries too
    repeat = min(5, QUEUE_LIMIT // each)
    sleep = 1.5e-6 * (probed.host_us or 0.0) * repeat + 1e-3
    if repeat == 0 or sleep > LONGEST_SLEEP:
        return None
    return {"repeat": repeat, "sleep_seconds": sleep}


class Event(NamedTuple):
    """A kernel or a copy on the device: its name, when it began and how long it took, in microseconds."""

    name: str
    start: float
    took: float


def captured(step: Step, device: torch.device, steps: int = 1) -> list[Event]:
    """Kernels and copies of so many steps on the device, as torch.profiler (CUPTI) sees them."""
    from torch.profiler import ProfilerActivity, profile

    machine.synchronize(device)
    with _silence(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        machine.synchronize(device)
    return on_device(profiler.events() or [])


def on_device(events: Iterable[Any]) -> list[Event]:
    """Kernels and copies among the profiler's events, in the order of their start."""
    found = [
        Event(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in events
        if str(event.device_type) == "DeviceType.CUDA"
        # torch marks the span of `Optimizer.step` on the device too: that is no kernel.
        and not event.name.startswith(("Optimizer.", "ProfilerStep"))
    ]
    return sorted(found, key=lambda event: event.start)


def _peak(step: Step, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(step: Step) -> int:
    """What torch's allocator holds at most at one time during a step, beyond what it held before.

    Memory that NumPy or a library takes from the system itself is not seen.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    with _silence(), profile(activities=activities, profile_memory=True, acc_events=False) as profiler:
        step()
    kineto = profiler.profiler
    assert kineto is not None
    events: Any = kineto.kineto_results
    changes: list[tuple[int, int]] = [
        (e.start_ns(), e.nbytes()) for e in events.events() if e.name() == "[memory]"
    ]
    return max(accumulate((size for _, size in sorted(changes)), initial=0))


@contextmanager
def _silence() -> Iterator[None]:
    """The profiler's library tells stderr that it starts and stops, and has no setting against it."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
