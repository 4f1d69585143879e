"""The kernels of a step compiled for a GPU that need not be there, and what they would take of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from ..models.architectures import Model
from ..models.traffic import Traffic
from ..report import tables
from . import compiled, static_costs
from .executed import executed
from .gpus import GPUS, Gpu
from .profile_steps import Kernel, Profile, ProfileCase, Variant, columns, kernel_of, traffic_of, variants
from .static_costs import Bound, Occupancy

WORKERS = 2
FEW = 3  # cases, which this process compiles itself
NOTE = (
    "On paper: registers, accesses and instructions are those of the compiled code, bytes what the step must "
    "move, times the published bandwidth and issue rate of bench/predict/gpus.py; no GPU was measured."
)


@dataclass
class StaticKernel(Kernel):
    """What one kernel would take."""

    lanes: int  # elements of all tiles, those that no tensor fills among them
    registers: int  # of a thread
    spilled: int  # bytes of stack of a thread
    shared: int  # bytes of a program
    occupancy: Occupancy
    in_flight: int  # bytes that the warps of a processor ask for at once
    widest: int | None  # bytes of an access that moves elements
    narrowest: int | None
    instructions: float  # of a lane, for each element
    executed: float  # of them, where no division or root takes its slow path
    seconds: Bound
    bound: str


@dataclass(frozen=True, kw_only=True)
class StaticCase(ProfileCase):
    """The kernels of one step, and its totals."""

    kernels: list[StaticKernel]
    launches: int
    moved: int
    moved_per_param: float
    seconds: Bound


@dataclass(kw_only=True)
class StaticProfile(Profile):
    """Steps on a model: numbers in bytes, seconds and instructions of a lane."""

    schema: int = 1
    gpu: Gpu
    triton: str
    cases: list[StaticCase]

    @property
    def title(self) -> str:
        """Model, GPU and compiler."""
        speed = f"{self.gpu.name} ({self.gpu.target}) at {self.gpu.bandwidth / 1e12:.3g} TB/s"
        return f"{self.about_model}, {speed}, Triton {self.triton}"


def profile(
    cases: Sequence[ProfileCase], model: Model, gpu_name: str, workers: int = WORKERS
) -> StaticProfile:
    """The static profile of steps on a model."""
    import triton

    gpu = GPUS[gpu_name]
    one = partial(profile_case, model=model, gpu=gpu)
    if len(cases) <= FEW or workers < 2 or (os.cpu_count() or 1) < 2:
        profiles = list(map(one, cases))
    else:  # another process each: the compiler holds the interpreter
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            profiles = list(pool.map(one, cases))
    return StaticProfile(**model.facts, gpu=gpu, triton=triton.__version__, cases=profiles)


def profile_case(case: ProfileCase, model: Model, gpu: Gpu) -> StaticCase:
    """One step: its kernels, and its totals."""
    kernels = [measured(variant, gpu) for variant in variants(case, model)]
    moved = sum(kernel.moved for kernel in kernels)
    seconds = [kernel.seconds for kernel in kernels]
    return StaticCase(
        **vars(case),
        kernels=kernels,
        launches=len(kernels),
        moved=moved,
        moved_per_param=moved / model.count,
        seconds=Bound(*(sum(getattr(one, key) for one in seconds) for key in ("memory", "issue", "bound"))),
    )


def measured(variant: Variant, gpu: Gpu) -> StaticKernel:
    """What one kernel takes."""
    built = built_for(variant, gpu.target)
    used = compiled.usage(built)
    spec = variant.spec
    moves, stand, run, warps = traffic_of(variant), 0.0, 0.0, 4
    if spec is not None:
        counted = built
        if variant.kernel == "norm":  # the last program alone decides
            counted = compiled.compiled_norm(spec, None, gpu.target)
        stand = len(compiled.instructions(counted)) / counted.elements
        run = len(executed(counted)) / counted.elements
        warps = built.built.warps
    room = static_costs.occupancy(gpu.target, used.registers, warps, built.shared)
    time = static_costs.bound(gpu, moves.memory * variant.elements, run * variant.lanes)
    needed = zip(("ld", "st"), moves.accessed, strict=True)
    widths = [width for kind, of_element in needed for width in built.widths(kind, of_element)]
    return StaticKernel(
        *kernel_of(variant),
        lanes=variant.lanes,
        registers=used.registers,
        spilled=used.stack,
        shared=built.shared,
        occupancy=room,
        in_flight=_in_flight(built, moves, room.warps),
        widest=max(widths, default=None),
        narrowest=min(widths, default=None),
        instructions=round(stand, 2),
        executed=round(run, 2),
        seconds=time,
        bound=time.by,
    )


def _in_flight(built: compiled.Compiled, moves: Traffic, warps: int) -> int:
    """Bytes that the warps of a processor ask for at once, where each asks for all of its tile."""
    if built.tile is None:
        return 0
    return int(moves.read) * built.elements * warps * static_costs.PROCESSORS[built.target].lanes


def built_for(variant: Variant, target: str) -> compiled.Compiled:
    """One kernel for a target."""
    if variant.spec is None:
        return compiled.compiled_control(variant.decider, target)
    if variant.kernel == "norm":
        return compiled.compiled_norm(variant.spec, variant.decider, target)
    return compiled.compiled_for(variant.spec, target, variant.kernel, variant.as_arguments)


# -- shown


def kernels_table(case: StaticCase) -> tables.Table:
    """Each kernel of a step."""

    def widths(kernel: StaticKernel) -> str:
        ends = sorted({kernel.narrowest or 0, kernel.widest or 0} - {0}, reverse=True)
        return " to ".join(map(str, ends)) or "-"

    shown: tables.Columns[StaticKernel] = {
        "registers": lambda kernel: str(kernel.registers),
        "spilled B": lambda kernel: str(kernel.spilled),
        "warps": lambda kernel: f"{kernel.occupancy.warps}/{kernel.occupancy.most}",
        "KB in flight": lambda kernel: f"{kernel.in_flight / 1024:.0f}",
        "access B": widths,
        "bytes": lambda kernel: f"{kernel.bytes:g}",
        "instr.": lambda kernel: f"{kernel.instructions:.1f}",
        "executed": lambda kernel: f"{kernel.executed:.1f}",
        "memory ms": lambda kernel: tables.milliseconds(kernel.seconds.memory),
        "issue ms": lambda kernel: tables.milliseconds(kernel.seconds.issue),
        "bound by": lambda kernel: kernel.bound if kernel.elements else "-",
    }
    return tables.table_of(case.kernels, columns(shown))


def totals_table(cases: Sequence[StaticCase]) -> tables.Table:
    """The totals of each step."""
    shown: tables.Columns[StaticCase] = {
        "step": lambda case: case.title,
        "launches": lambda case: str(case.launches),
        "bytes a parameter": lambda case: f"{case.moved_per_param:.1f}",
        "GB moved": lambda case: f"{case.moved / 1e9:.3g}",
        "most registers": lambda case: str(max(kernel.registers for kernel in case.kernels)),
        "spilled B": lambda case: str(sum(kernel.spilled for kernel in case.kernels)),
        "memory ms": lambda case: tables.milliseconds(case.seconds.memory),
        "issue ms": lambda case: tables.milliseconds(case.seconds.issue),
        "at least ms": lambda case: tables.milliseconds(case.seconds.bound),
    }
    return tables.table_of(cases, shown)


def show(results: StaticProfile) -> None:
    """Prints the tables."""
    print(results.title)
    for case in results.cases:
        print(f"\n{case.title}:")
        tables.show(kernels_table(case), width=170)
    print("\nEach step:")
    tables.show(totals_table(results.cases))
    print(NOTE)
