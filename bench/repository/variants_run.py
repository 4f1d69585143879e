"""One variant of the kernels beside the present ones: in one process, each a copy of the kernels of its own.

Triton refuses a constant that has changed since a kernel was compiled. So a variant is another copy of the
package of kernels, of which constants are exchanged before anything is compiled.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fusedcalib
from fusedcalib.executors.triton import run as gpu

from ..bootstrap import ROOT
from ..env import machine
from ..measure import gate, timing
from ..measure.case import SAMPLE
from ..measure.method import SUBJECTS, Extras
from ..models import shapes
from ..models.architectures import Shape
from ..models.shapes import ParamList
from ..models.traffic import CACHED, DTYPES
from ..report.records import Spread

Changes = Mapping[str, Mapping[str, Any]]  # of modules of the kernels: constants by name
FOLDER = ROOT / "kernels"
STEPS = 3
_numbers = itertools.count(1)


class Variant(NamedTuple):
    """Kernels with other constants, and the step that shows the difference."""

    name: str  # of the row
    changes: Changes
    shapes: tuple[Shape, ...]
    optimizer: str = "AdamW"  # of method.SUBJECTS
    options: Mapping[str, Any] = {}  # `centralize`, `max_grad_norm`
    dtypes: str = "fp32"  # of traffic.DTYPES
    exact: bool = False  # sums are made in the same order, so that results are the same to the bit
    norm: bool = False  # only what measures and decides is timed, not the step

    @property
    def moved(self) -> float:
        """Bytes that the step moves."""
        width = DTYPES[self.dtypes].moved(SUBJECTS[self.optimizer].states())
        return float(width * sum(map(math.prod, self.shapes)))


@dataclass
class VariantRow:
    """What became of a variant."""

    name: str
    kept: bool = False  # whether it is faster by more than the spread of its ratios
    reason: str | None = None  # why it was not timed
    ratio: Spread | None = None  # its time over that of the present kernels
    ms: dict[str, float | None] = field(default_factory=dict)
    moved: float | None = None  # bytes of what was timed
    flush: str | None = None


def launch_with(changes: Changes) -> Any:
    """The module `launch` of a copy of the kernels that has these constants.

    Raises:
        AttributeError: there is no constant of that name.
    """
    name = f"fusedcalib_kernels_{next(_numbers)}"
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(FOLDER)]
    sys.modules[name] = module_from_spec(spec)
    for module in sorted(changes, key="launch".__eq__):  # before others take them over
        copy = importlib.import_module(f"{name}.{module}")
        for constant, value in changes[module].items():
            present = getattr(copy, constant)
            wrapped = type(present).__name__ == "constexpr"
            setattr(copy, constant, type(present)(value) if wrapped else value)
    return importlib.import_module(f"{name}.launch")


@contextmanager
def engine_of(launch: Any) -> Iterator[None]:
    """The engine launches the kernels of this copy."""
    from fusedcalib.executors.triton import decide, executor

    modules: tuple[Any, ...] = (gpu, decide, executor)
    present = [module.launch for module in modules]
    for module in modules:
        module.launch = launch
    try:
        yield
    finally:
        for module, before in zip(modules, present, strict=True):
            module.launch = before


class Side:
    """A step with one copy of the kernels, on parameters of its own."""

    backend = "triton"

    def __init__(self, variant: Variant, launch: Any, device: torch.device) -> None:
        self.spec, self._launch = ParamList(variant.name, variant.shapes), launch
        storage = DTYPES[variant.dtypes]
        self.params = shapes.build(self.spec, device, storage.param)
        options = {**variant.options, **storage.options}
        subject = SUBJECTS[variant.optimizer]
        cls = getattr(fusedcalib, subject.cls)
        self.optimizer = cls(self.params, **subject.options, **options, backend=self.backend)

    def step(self) -> None:
        with engine_of(self._launch):
            self.optimizer.step()

    def norm(self) -> None:
        """What comes before the step, alone."""
        with engine_of(self._launch):
            self.optimizer._engine.plan.decider.decide()

    def tensors(self) -> list[Tensor]:
        """All its parameters and states."""
        states = [self.optimizer.state[p] for p in self.params]
        found = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [*(param.detach() for param in self.params), *found]


Timer = Callable[[dict[str, timing.Step], torch.device, bool, float], timing.Rounds]


def on_device(
    steps: dict[str, timing.Step], device: torch.device, flush: bool, seconds: float
) -> timing.Rounds:
    """Times on the GPU, in interleaved rounds."""
    for step in [*steps.values()] * 10:  # clocks must rise
        step()
    machine.synchronize(device)
    repeat = 1 if flush else 5
    samplers = {
        name: timing.device_sampler(step, device, sleep_seconds=2e-3, repeat=repeat, flush=flush)
        for name, step in steps.items()
    }
    return timing.interleave(samplers, rounds=40, seconds=seconds)


def measured(variant: Variant, device: torch.device, seconds: float, timer: Timer = on_device) -> VariantRow:
    """The row of a variant: it may be kept for its results, and for its time."""
    from fusedcalib.kernels import launch as present

    sides = {"present": Side(variant, present, device)}
    sides["variant"] = Side(variant, launch_with(variant.changes), device)
    if wrong := fault(variant, sides):
        return VariantRow(variant.name, reason=wrong)
    steps: dict[str, timing.Step] = {
        name: side.norm if variant.norm else side.step for name, side in sides.items()
    }
    moved = (
        sum(p.numel() * p.element_size() for p in sides["present"].params) if variant.norm else variant.moved
    )
    flush = moved < CACHED
    rounds = timer(steps, device, flush, seconds)
    ratio = rounds.ratio("variant", "present")
    spreads = {name: rounds.time(name) for name in steps}
    times = {name: 1e3 * spread.median if spread else None for name, spread in spreads.items()}
    better = ratio is not None and 1 - ratio.median > ratio.p90 - ratio.p10
    return VariantRow(variant.name, better, None, ratio, times, moved, "write" if flush else "none")


def fault(variant: Variant, sides: dict[str, Side]) -> str | None:
    """What is wrong with the results after some steps; None where nothing is.

    Both sides are held against the fp64 reference; to the bit against each other where sums are made alike.
    """
    spec, subject = sides["present"].spec, SUBJECTS[variant.optimizer]
    options = variant.options
    kind = gate.Kind(Extras(clip=options.get("max_grad_norm"), gc=options.get("centralize", False)))
    entries = {name: gate.Entry(kind, side.params, side.step) for name, side in sides.items()}
    verdicts = gate.check(spec, entries, subject, max(1, spec.params // SAMPLE))
    for name, verdict in verdicts.items():
        if not verdict.passed:
            how = verdict.reason or f"{verdict.of_bound:.3g} times the bound away from float64"
            return f"wrong result of the {name} kernels: {how}"
    if variant.exact:
        pairs = zip(*(side.tensors() for side in sides.values()), strict=True)
        apart = sum(not torch.equal(_bits(x), _bits(y)) for x, y in pairs)
        return f"{apart} tensors differ from those of the present kernels" if apart else None
    return None


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.ndim else x
