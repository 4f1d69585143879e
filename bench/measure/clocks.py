"""The numbers of methods that passed the gate: time on each clock, ratios, and what a step costs besides."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch

from ..env import machine
from ..models.shapes import ParamList
from ..report.records import Spread
from ..report.results import Row
from . import probe
from .ceilings import stream_of
from .method import Built
from .rivals import sentence
from .timing import Rounds, Sampler, Step, device_sampler, interleave, repeats_for, wall_sampler

Tell = Callable[[str, float], None]  # what is being done, and which share of it is over
# Beside one of these, the first that there is, every sample of a CPU stands; tables have their ratios to it.
ANCHORS = ("torch_fused", "torch_foreach", "own_plain")


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds at most, seconds at most for each kind of clock."""

    rounds: int = 30
    seconds: float = 8.0
    warmup: int = 10  # steps on a GPU, whose clocks must rise; on a CPU the gate has warmed all


@dataclass
class Timed:
    """Rows by method, why others have none, and whether the user ended it early."""

    rows: dict[str, Row] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def measure(
    spec: ParamList,
    methods: dict[str, Built],
    device: torch.device,
    effort: Effort,
    tell: Tell,
    *,
    flush: bool,
    reads: int | None,
    references: tuple[str, ...],
) -> Timed:
    """Time methods in turns. One that raises costs itself only.

    Args:
        flush: whether caches are emptied before each step on a GPU.
        reads: arrays of the memory stream beside them, if there is to be one.
        references: the ratios to these are written.

    Raises:
        RuntimeError: the method that the others stand beside raised.
    """
    gpu = machine.on_gpu(device)
    out = Timed()
    steps = {name: _guarded(name, built.step, out.reasons) for name, built in methods.items()}
    if reads and methods:
        with suppress(ImportError):  # no ceiling then; `ceil.how` says why
            steps[f"stream_{reads}r{reads - 1}w"] = stream_of(device, spec.params, reads)
    probes = _probes(steps, device, effort.warmup if gpu else 1, tell)
    steps = {name: step for name, step in steps.items() if name not in out.reasons}
    if not steps:
        return out
    fresh = {name: built.fresh for name, built in methods.items()}
    first = next(iter(steps))
    repeat = 1 if gpu else repeats_for(wall_sampler(steps[first], device, 3)())
    anchor = None if gpu else next((name for name in ANCHORS if name in steps), first)
    in_turns = partial(interleave, rounds=effort.rounds, seconds=effort.seconds)
    samplers = {
        name: wall_sampler(step, device, repeat, name == anchor, fresh.get(name))
        for name, step in steps.items()
    }
    wall = in_turns(samplers, anchor=anchor, tell=lambda share: tell("wall time", share))
    queued: dict[str, Sampler] = {}
    for name, step in steps.items() if gpu and not wall.interrupted else ():
        fit = probe.queue(probes[name], flush)
        if fit is not None:
            queued[name] = device_sampler(step, device, flush=flush, fresh=fresh.get(name), **fit)
    on_device = in_turns(queued, tell=lambda share: tell("device time", share))
    if anchor in out.reasons:
        raise RuntimeError(f"{anchor}, which the others are timed beside, broke: {out.reasons[anchor]}")
    out.interrupted = wall.interrupted or on_device.interrupted
    rounds = (wall.without(out.reasons), on_device.without(out.reasons))
    for name in steps:
        if name not in out.reasons:
            out.rows[name] = _row(name, *rounds, probes[name], references, gpu)
    return out


def _guarded(name: str, step: Step, reasons: dict[str, str]) -> Step:
    """A step that raises does so once, and then nothing: its times are left out."""

    def guarded() -> None:
        if name not in reasons:
            try:
                step()
            except Exception as error:  # another library's, of any kind
                reasons[name] = sentence(error)

    return guarded


def _probes(steps: dict[str, Step], device: torch.device, warmup: int, tell: Tell) -> dict[str, probe.Probe]:
    found = {}
    for index, (name, step) in enumerate(steps.items()):
        tell("memory and launches", index / len(steps))
        for _ in range(warmup):
            step()
        found[name] = probe.measure(step, device)
    return found


def _row(
    name: str, wall: Rounds, on_device: Rounds, probed: probe.Probe, references: tuple[str, ...], gpu: bool
) -> Row:
    """The numbers of a method, or of the memory stream beside them."""
    main = on_device if gpu else wall
    device_time, wall_time = on_device.time(name), wall.time(name)
    streams = [other for other in main.samples if other.startswith("stream_")]
    to_stream = main.ratio(streams[0], name) if streams else None
    row = Row(
        name,
        "memory stream",
        {"gc": False},
        wall_ms=1e3 * wall_time.median if wall_time else None,
        ratio_to=_ratios(main, name, (*references, *streams)),
        wall_ratio_to=_ratios(wall, name, (*references, *streams)),
        pct_stream=100 * to_stream.median if to_stream else None,
        kept=main.kept(name),
        dropped=main.dropped(name),
        **vars(probed),
    )
    if device_time:
        ends = (device_time.median, device_time.p10, device_time.p90)
        row.device_ms_median, row.device_ms_p10, row.device_ms_p90 = (1e3 * end for end in ends)
    return row


def _ratios(rounds: Rounds, name: str, others: tuple[str, ...]) -> dict[str, Spread]:
    spreads = {to: rounds.ratio(name, to) for to in others if to != name}
    return {to: spread for to, spread in spreads.items() if spread}
