"""The kernels of a step as a GPU runs them: time, bytes a second, share of a copy's bandwidth.

torch.profiler (CUPTI) tells the time of each kernel, the engine's tables which kernel of a step it is.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch

import fusedcalib

from ..env import machine
from ..measure import ceilings, timing
from ..measure.method import SUBJECTS
from ..models.architectures import Model
from ..models.shardings import kind_of
from ..models.traffic import DTYPES
from ..report import tables
from . import profile_static, profile_steps
from .plan_steps import KINDS
from .profile_steps import ProfileCase, Variant

Results = dict[str, Any]
WARM, STEPS = 5, 20
NAMES = {
    "norm": "norm_kernel",
    "control": "control_kernel",
    "sums": "row_sums_kernel",
    "step": "step_kernel",
    "finish": "project_kernel",
}
CACHED = 400e6  # bytes; a step that moves fewer finds some of them in an L2 cache of 50 MB


class Event(NamedTuple):
    """Something that ran on the device: its name, when it began and how long it took, in microseconds."""

    name: str
    start: float
    took: float


def here() -> torch.device | None:
    """The GPU to measure on, if there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def profile(
    cases: Sequence[ProfileCase],
    model: Model,
    device: torch.device,
    told: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Steps a model's parameters on a GPU under the profiler.

    A case that breaks costs that case only: what was raised is among the "failures". `told` is told what is
    known after each.

    Raises:
        ValueError: the model does not fit.
    """
    copy = ceilings.measure(device)["copy_gbs"]
    results: Results = {
        **asdict(machine.describe(device)),
        "model": model.name,
        "params": model.count,
        "tensors": len(model.params),
        "copy_gbs": copy,
        "cases": [],
        "failures": [],
    }
    for case in cases:
        try:
            results["cases"].append(_case(case, model, device, copy))
        except torch.OutOfMemoryError as error:
            raise ValueError(f"{model.name} does not fit on {device}: take a smaller --model") from error
        except Exception as error:  # of the compiler or the profiler
            traceback.print_exc()
            results["failures"].append({"case": case.title, "error": f"{type(error).__name__}: {error}"})
        told(results)
    return results


def _case(case: ProfileCase, model: Model, device: torch.device, copy: float) -> Results:
    optimizer = made(case, model, device)
    for _ in range(WARM):
        optimizer.step()
    plan = optimizer._engine.plan
    decides = plan.decider.on_device
    alike = [1] * sum(len(bucket.slots) for bucket in plan.buckets)
    expected = profile_steps.launches(plan.buckets, alike, plan.needs.measure, decides)
    kernels, other = attributed(captured(optimizer.step, device), expected, STEPS)
    host = timing.host_seconds(device, optimizer.step)
    rows = [_row(variant, took, copy) for variant, took in zip(expected, kernels, strict=True)]
    return {
        "optimizer": case.optimizer,
        "options": list(case.options),
        "dtypes": case.dtypes,
        "kernels": rows,
        "moved": sum(row["moved"] for row in rows),
        "device_us": sum(kernels) + other,
        "other_us": other,
        "host_us": 1e6 * host,
    }


def made(case: ProfileCase, model: Model, device: torch.device, backend: str = "triton") -> Any:
    """The optimizer of a case on parameters of the model, gradients there."""
    storage = DTYPES[case.dtypes]
    options = case.chosen() | storage.options
    groups = []
    for kind, own in KINDS.items():
        params = [
            torch.nn.Parameter(torch.randn(param.shape, dtype=storage.param, device=device))
            for param in model.params
            if kind_of(param) == kind
        ]
        for param in params:
            param.grad = torch.randn_like(param)
        if params:
            groups.append({"params": params, **own})
    return getattr(fusedcalib, SUBJECTS[case.optimizer].cls)(groups, **options, backend=backend)


def captured(step: timing.Step, device: torch.device) -> list[Event]:
    """What the device did in so many steps."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    machine.synchronize(device)
    with watch(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
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


def attributed(events: Sequence[Event], expected: Sequence[Variant], steps: int) -> tuple[list[float], float]:
    """Median microseconds of each expected kernel in a step, and mean ones of all else.

    Raises:
        ValueError: the kernels are not those of so many steps.
    """
    own = tuple(NAMES.values())
    kernels = [event for event in events if event.name.startswith(own)]
    wanted = [NAMES[variant.kernel] for variant in expected] * steps
    if len(kernels) != len(wanted) or not all(
        event.name.startswith(name) for event, name in zip(kernels, wanted, strict=True)
    ):
        raise ValueError(
            f"the profiler saw {len(kernels)} of our kernels in {steps} steps, where {len(wanted)} were "
            "launched, or in another order: are other optimizers at work, or is CUPTI missing?"
        )
    times = np.array([event.took for event in kernels]).reshape(steps, len(expected))
    other = sum(event.took for event in events if not event.name.startswith(own))
    return [float(took) for took in np.median(times, axis=0)], other / steps


def _row(variant: Variant, took: float, copy: float) -> Results:
    width = profile_steps.traffic_of(variant).memory
    moved = width * variant.elements
    gbs = moved / took * 1e-3  # bytes in a microsecond are MB a second
    return {
        "kernel": variant.kernel,
        "tile": profile_steps.tile_text(variant),
        "tensors": variant.tensors,
        "elements": variant.elements,
        "bytes": width,
        "moved": moved,
        "us": took,
        "gbs": gbs if moved else None,
        "pct_copy": 100 * gbs / copy if moved else None,
    }


# -- shown


def title(results: Results) -> str:
    """Model, GPU and versions."""
    versions = results["versions"]
    return (
        f"{results['model']}: {results['params'] / 1e6:,.1f}M parameters in {results['tensors']} tensors, "
        f"{machine.Head.of(results).short_name}, torch {versions['torch']}, Triton {versions['triton']}; "
        f"a copy moves {results['copy_gbs']:,.0f} GB/s"
    )


def table(found: Results) -> tables.Table:
    """Each kernel of a step."""
    columns: tables.Columns[Results] = {
        **profile_static.COLUMNS,
        "bytes": lambda row: str(row["bytes"]),
        "us": lambda row: f"{row['us']:.1f}",
        "GB/s": lambda row: tables.number(row["gbs"], ",.0f"),
        "% of a copy": lambda row: tables.number(row["pct_copy"], ".0f"),
    }
    return tables.table_of(found["kernels"], columns)


def show(found: Results) -> None:
    """Prints the table of a case."""
    case = ProfileCase(found["optimizer"], tuple(found["options"]), found["dtypes"])
    print(f"\n{case.title}:")
    tables.show(table(found))
    print(
        f"a step: {found['device_us']:.1f} us on the GPU ({found['other_us']:.1f} of other kernels "
        f"and copies), {found['host_us']:.1f} us on the host"
    )
    if found["moved"] < CACHED:
        print("So few bytes lie partly in the L2 cache: GB/s may be more than the memory's.")
