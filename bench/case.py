"""One case: several methods on one parameter list, gated, timed together and written as data."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gate, probe, shapes, timing
from .baselines import EXTRAS, METHODS, NONE, SUBJECTS, Built, NotAvailableError, Subject, step_bytes
from .ceilings import stream_of
from .timing import Rounds, Sampler, Spread, device_sampler, interleave, repeats_for, wall_sampler

ANCHOR = "torch_fused"
REFERENCES = (
    *(ANCHOR, "torch_foreach", "eager_gc_fused", "compiled_gc", "own_plain"),
    *(f"eager_{extras}" for extras in EXTRAS),
)
SAMPLE = 2**21  # elements of a list that the gate judges: every row of a short list, some of a long one

DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32-state": (torch.bfloat16, torch.float32),
}


@dataclass(frozen=True)
class Case:
    """What to measure."""

    list: str
    methods: tuple[str, ...]
    dtypes: str = "fp32"
    subject: str = "AdamW"
    extras: str = ""  # what of baselines.EXTRAS the case is about

    @property
    def title(self) -> str:
        return f"{self.list} {self.subject} {self.dtypes}{self.extras and f' with {self.extras}'}"


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds at most, seconds at most for each kind of clock."""

    rounds: int = 30
    seconds: float = 8.0
    warmup: int = 10  # steps on a GPU, whose clocks must rise; on a CPU the gate has warmed all


def run(case: Case, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Measure a case. A method that cannot run, or fails the gate, gets a reason and no numbers."""
    spec = shapes.get(case.list)
    subject = SUBJECTS[case.subject]
    dtype, state_dtype = DTYPES[case.dtypes]
    states = subject.states()
    plain = step_bytes(dtype.itemsize, dtype.itemsize, states * [state_dtype.itemsize])
    width = plain + EXTRAS.get(case.extras, NONE).width(dtype)
    flush = timing.on_gpu(device) and spec.params * width < 400e6
    built, reasons = _build(case, spec, device, subject)
    gated = {name: _entry(name, params, b) for name, (params, b) in built.items()}
    every = max(1, spec.params // SAMPLE)
    verdicts = gate.check(spec, gated, subject, every) if built else {}
    for name, verdict in verdicts.items():
        if not verdict.passed:
            reasons[name] = verdict.reason or (
                f"wrong result: {verdict.of_bound:.3g} times the bound away from float64"
            )
            del built[name]
    for name in [name for name in built if METHODS[name].extras != NONE]:
        if fault := _fault(name, built[name][1], subject, device, dtype):
            reasons[name] = fault
            del built[name]
    methods = _refreshed(spec, built)
    # What has extras moves more than the stream beside it would.
    reads = 2 + states if case.dtypes == "fp32" and spec.params >= 2**20 and not case.extras else None
    rows = _time(spec, reads, methods, device, effort, flush) if methods else {}
    for name, verdict in verdicts.items():
        if name in rows:
            rows[name] |= {"max_err_vs_fp64": verdict.max_err, "note": methods[name].note}
            rows[name]["bytes_per_param"] = plain + METHODS[name].extras.width(dtype)
    del built, gated, methods
    gc.collect()
    if timing.on_gpu(device):
        torch.cuda.empty_cache()
    return {
        "list": spec.name,
        "tensors": spec.tensors,
        "params": spec.params,
        "dtypes": case.dtypes,
        "subject": case.subject,
        "extras": case.extras,
        "bytes_per_param": width,
        "flush": "write" if flush else "none",
        "clock": "device" if timing.on_gpu(device) else "wall",
        "methods": [
            empty_row(name) | rows.get(name, {}) | {"reason": reasons.get(name)}
            for name in (*case.methods, *(name for name in rows if name not in METHODS))
        ],
    }


def _entry(name: str, params: list[Tensor], built: Built) -> gate.Entry:
    """A method for the gate: without its noise, and clipped by the norm that it has."""
    if built.set_noise:
        built.set_noise(0.0)
    method = METHODS[name]
    extras = replace(method.extras, noise=None)
    torch_norm = built.spoils and extras.clip is not None
    return gate.Entry(method.gc, params, built.step, extras, torch_norm, built.averages)


def _fault(name: str, built: Built, subject: Subject, device: torch.device, dtype: torch.dtype) -> str | None:
    """Judges what the gate cannot see, and gives the method its noise back."""
    extras = METHODS[name].extras
    if built.set_noise and extras.noise is not None:
        built.set_noise(extras.noise)
    try:
        return gate.fault(METHODS[name], subject, device, dtype)
    except Exception as error:  # as in the gate
        return f"{type(error).__name__}: {error}"


@torch.no_grad()
def _refreshed(spec: shapes.ParamList, built: dict[str, tuple[list[Tensor], Built]]) -> dict[str, Built]:
    """The methods; those that change their gradients are given them anew from a pool."""
    spoiling = [params for params, b in built.values() if b.spoils]
    if spoiling:
        shapes.load_gradients(spec, spoiling, 0)
    pool = [param.grad.clone() for param in spoiling[0] if param.grad is not None] if spoiling else []

    def refresh(params: list[Tensor]) -> None:
        for param, value in zip(params, pool, strict=True):
            assert param.grad is not None
            param.grad.copy_(value)

    return {
        name: replace(b, fresh=partial(refresh, params)) if b.spoils else b
        for name, (params, b) in built.items()
    }


def stream_name(reads: int) -> str:
    """As `stream_4r3w`: arrays read and written."""
    return f"stream_{reads}r{reads - 1}w"


def empty_row(name: str) -> dict[str, Any]:
    """A method's row before anything is known: every number is None, never 0."""
    numbers = ("device_ms_median", "device_ms_p10", "device_ms_p90", "wall_ms", "host_us")
    counts = ("launches", "peak_extra_bytes", "pct_stream", "max_err_vs_fp64", "kept", "dropped")
    title = METHODS[name].title if name in METHODS else "memory stream"
    return {
        "name": name,
        "title": title,
        "options": METHODS[name].options if name in METHODS else {"gc": False},
        **dict.fromkeys((*numbers, *counts)),
        "ratio_to": {},
        "wall_ratio_to": {},
        "note": "",
        "reason": None,
    }


def _build(
    case: Case,
    spec: shapes.ParamList,
    device: torch.device,
    subject: Subject,
) -> tuple[dict[str, tuple[list[Tensor], Built]], dict[str, str]]:
    """Each method on its own copy of the list, and why the others are not there."""
    built: dict[str, tuple[list[Tensor], Built]] = {}
    reasons: dict[str, str] = {}
    source: list[Tensor] | None = None
    dtype, state_dtype = DTYPES[case.dtypes]
    for name in case.methods:
        params = shapes.build(spec, device, dtype, source)
        try:
            made = METHODS[name].make(spec, params, subject)
            if state_dtype != dtype:
                _widen_state(made, params, state_dtype)
        except NotAvailableError as error:
            reasons[name] = str(error)
        except Exception as error:  # of another library: it costs that method only
            reasons[name] = f"{type(error).__name__}: {error}"
        else:
            built[name] = (params, made)
            source = params
    return built, reasons


def _widen_state(made: Built, params: list[Tensor], dtype: torch.dtype) -> None:
    """Put fp32 averages under bf16 parameters, before the first step."""
    if made.optimizer is None or not hasattr(made.optimizer, "backend"):
        raise NotAvailableError("takes no state of another type than the parameter's")
    for param in params:
        for key in ("exp_avg", "exp_avg_sq"):
            made.optimizer.state[param][key] = torch.zeros_like(param, dtype=dtype)


def _time(
    spec: shapes.ParamList,
    reads: int | None,
    methods: dict[str, Built],
    device: torch.device,
    effort: Effort,
    flush: bool,
) -> dict[str, dict[str, Any]]:
    """All numbers of the methods that passed, by name; `reads`: arrays of the stream beside them."""
    gpu = timing.on_gpu(device)
    steps = {name: built.step for name, built in methods.items()}
    fresh = {name: built.fresh for name, built in methods.items()}
    if reads:
        with suppress(ImportError):  # no ceiling then; `ceil.how` says why
            steps[stream_name(reads)] = stream_of(device, spec.params, reads)
    for step in steps.values():
        for _ in range(effort.warmup if gpu else 1):
            step()
    probes = {name: probe.measure(step, device) for name, step in steps.items()} if gpu else {}
    first = next(iter(steps))
    repeat = 1 if gpu else repeats_for(wall_sampler(steps[first], device, 3)())
    anchor = None if gpu else next((name for name in (ANCHOR, "torch_foreach") if name in steps), first)
    wall = interleave(
        {
            name: wall_sampler(step, device, repeat, name == anchor, fresh.get(name))
            for name, step in steps.items()
        },
        rounds=effort.rounds,
        seconds=effort.seconds,
        anchor=anchor,
    )
    queued: dict[str, Sampler] = {}
    for name, step in steps.items():
        fit = probe.queue(probes[name], flush) if gpu else None
        if fit is not None:
            queued[name] = device_sampler(step, device, flush=flush, fresh=fresh.get(name), **fit)
    on_device = interleave(queued, rounds=effort.rounds, seconds=effort.seconds)
    return {name: _row(name, wall, on_device, probes.get(name), gpu) for name in steps}


def _row(name: str, wall: Rounds, on_device: Rounds, probed: probe.Probe | None, gpu: bool) -> dict[str, Any]:
    main = on_device if gpu else wall
    device_time, wall_time = on_device.time(name), wall.time(name)
    streams = [other for other in main.samples if other.startswith("stream_")]
    to_stream = main.ratio(streams[0], name) if streams else None
    row: dict[str, Any] = {
        "wall_ms": 1e3 * wall_time.median if wall_time else None,
        "ratio_to": _ratios(main, name, streams),
        "wall_ratio_to": _ratios(wall, name, streams),
        "pct_stream": 100 * to_stream.median if to_stream else None,
        "kept": main.kept(name),
        "dropped": main.dropped(name),
    }
    for key in ("median", "p10", "p90"):
        row[f"device_ms_{key}"] = 1e3 * getattr(device_time, key) if device_time else None
    return row | (asdict(probed) if probed else {})


def _ratios(rounds: Rounds, name: str, streams: list[str]) -> dict[str, Any]:
    spreads: dict[str, Spread | None] = {to: rounds.ratio(name, to) for to in (*REFERENCES, *streams)}
    return {to: asdict(spread) for to, spread in spreads.items() if spread and to != name}
