"""The kernels of a step as a GPU runs them: time, bytes a second, share of a copy's bandwidth.

torch.profiler (CUPTI) tells the time of each kernel, the engine's tables which kernel of a step it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import fusedcalib

from ..env import machine
from ..measure import ceilings, timing
from ..measure.method import SUBJECTS
from ..measure.probe import Event, captured
from ..models.architectures import Model
from ..models.shardings import kind_of
from ..models.traffic import CACHED, DTYPES
from ..report import tables
from ..report.records import Failure
from . import profile_steps
from .plan_steps import KINDS
from .profile_steps import Kernel, Profile, ProfileCase, Variant, columns, kernel_of

WARM, STEPS = 5, 20
NAMES = {
    "norm": "norm_kernel",
    "control": "control_kernel",
    "sums": "row_sums_kernel",
    "squares": "squares_kernel",
    "totals": "totals_kernel",
    "statistics": "observed_kernel",
    "step": "step_kernel",
    "finish": "project_kernel",
}


def here() -> torch.device | None:
    """The GPU to measure on, if there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


@dataclass
class GpuKernel(Kernel):
    """One kernel as it ran; a kernel that moves nothing has no speed."""

    us: float  # microseconds
    gbs: float | None
    pct_copy: float | None  # % of a copy's bandwidth


@dataclass(frozen=True, kw_only=True)
class GpuCase(ProfileCase):
    """The kernels of one step, and its times in microseconds."""

    kernels: list[GpuKernel]
    moved: int
    device_us: float
    other_us: float  # of them, other kernels and copies
    host_us: float


@dataclass(kw_only=True)
class GpuProfile(Profile, machine.Head):
    """Steps of a model's parameters on a GPU."""

    copy_gbs: float
    cases: list[GpuCase] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Model, GPU and versions."""
        versions = f"torch {self.versions['torch']}, Triton {self.versions['triton']}"
        speed = f"a copy moves {self.copy_gbs:,.0f} GB/s"
        return f"{self.about_model}, {self.short_name}, {versions}; {speed}"


def profile(
    cases: Sequence[ProfileCase],
    model: Model,
    device: torch.device,
    told: Callable[[GpuProfile, GpuCase | None], None] = lambda results, case: None,
) -> GpuProfile:
    """Steps a model's parameters on a GPU under the profiler.

    A case that breaks costs that case only: what was raised is among the failures. `told` is told what is
    known after each, and of the case itself unless it broke.
    """
    copy = ceilings.measure(device)["copy_gbs"]
    results = GpuProfile(**vars(machine.describe(device)), **model.facts, copy_gbs=copy)
    for case in cases:
        found = None
        try:
            found = _case(case, model, device, copy)
            results.cases.append(found)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"{model.name} does not fit on {device}: take a smaller --model") from error
        except Exception as error:  # of the compiler or the profiler
            results.failures.append(Failure.of(case.title, error))
        told(results, found)
    return results


def _case(case: ProfileCase, model: Model, device: torch.device, copy: float) -> GpuCase:
    optimizer = made(case, model, device)
    for _ in range(WARM):
        optimizer.step()
    plan = optimizer._engine.plan
    alike = [1] * sum(len(bucket.slots) for bucket in plan.buckets)
    expected = profile_steps.launches(plan.buckets, alike, plan.needs.measure, plan.decider.on_device)
    times, other = attributed(captured(optimizer.step, device, STEPS), expected, STEPS)
    kernels = [_kernel(variant, took, copy) for variant, took in zip(expected, times, strict=True)]
    return GpuCase(
        **vars(case),
        kernels=kernels,
        moved=sum(kernel.moved for kernel in kernels),
        device_us=sum(times) + other,
        other_us=other,
        host_us=1e6 * timing.host_seconds(device, optimizer.step),
    )


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


def _kernel(variant: Variant, took: float, copy: float) -> GpuKernel:
    found = GpuKernel(*kernel_of(variant), us=took, gbs=None, pct_copy=None)
    if found.moved:
        found.gbs = found.moved / took * 1e-3  # bytes in a microsecond are MB a second
        found.pct_copy = 100 * found.gbs / copy
    return found


# -- shown


def table(case: GpuCase) -> tables.Table:
    """Each kernel of a step."""
    shown: tables.Columns[GpuKernel] = {
        "bytes": lambda kernel: f"{kernel.bytes:g}",
        "us": lambda kernel: f"{kernel.us:.1f}",
        "GB/s": lambda kernel: tables.number(kernel.gbs, ",.0f"),
        "% of a copy": lambda kernel: tables.number(kernel.pct_copy, ".0f"),
    }
    return tables.table_of(case.kernels, columns(shown))


def show(case: GpuCase) -> None:
    """Prints the table of a case."""
    print(f"\n{case.title}:")
    tables.show(table(case))
    print(
        f"a step: {case.device_us:.1f} us on the GPU ({case.other_us:.1f} of other kernels "
        f"and copies), {case.host_us:.1f} us on the host"
    )
    if case.moved < CACHED:
        print("So few bytes lie partly in the L2 cache: GB/s may be more than the memory's.")
