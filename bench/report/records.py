"""What stands in files of results besides the cases: spreads, host times, trainings, goals, failures."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field

import numpy as np

from ..env.machine import Head


@dataclass
class Spread:
    """A median with the 10th and 90th percentile of `n` values."""

    median: float
    p10: float
    p90: float
    n: int
    disturbed: bool = False  # too few quiet samples, so that all were taken

    @staticmethod
    def of(values: list[float], disturbed: bool = False) -> Spread | None:
        """None where nothing was measured: a missing number is never a zero."""
        if not values:
            return None
        low, middle, high = np.percentile(values, [10, 50, 90])
        return Spread(float(middle), float(low), float(high), len(values), disturbed)

    @property
    def quiet(self) -> float | None:
        """The median; None on a busy machine, where no goal is reached or missed."""
        return None if self.disturbed else self.median


@dataclass
class HostRow:
    """Host time of a step: of all of it, and of what of ours is neither loop nor launch."""

    name: str
    host_us: float | None
    ratio_to: dict[str, Spread] = field(default_factory=dict)
    work_us: float | None = None
    work_to: Spread | None = None  # as a ratio to torch's whole step


HostRows = list[HostRow]


@dataclass
class HostCase:
    """Host time of steps whose gradients are as the variant says: see host.VARIANTS."""

    list: str
    variant: str
    methods: HostRows


@dataclass
class HostTimes(Head):
    """A file of host times alone."""

    host: list[HostCase]


@dataclass
class Band:
    """A number after each epoch, over the seeds."""

    median: list[float]
    p10: list[float]
    p90: list[float]


@dataclass
class Curve:
    """The trainings of an optimizer: mean training loss of each epoch, test accuracy in % after it."""

    title: str
    loss: Band
    accuracy: Band
    final: list[float]  # accuracy of each seed


@dataclass
class Gain:
    """Points of test accuracy that centring gains, seed by seed."""

    mean: float
    wins: int
    each: list[float]


@dataclass
class Training:
    """E1, the experiment of the main job: see digits.py. The differences are of the losses of two AdamW."""

    setting: dict[str, float]
    seeds: list[int]
    curves: dict[str, Curve]
    max_diff_first_epoch: float
    max_diff_all: float
    tolerance_first_epoch: float
    gain: Gain


@dataclass
class Failure:
    """A case that broke, and what was raised."""

    case: str
    error: str

    @classmethod
    def of(cls, case: str, error: Exception) -> Failure:
        """To be called where the error is handled: shows where it came from."""
        traceback.print_exc()
        return cls(case, f"{type(error).__name__}: {error}")


@dataclass
class GoalValue:
    """A goal with the value that a run has, and the best of the three marks that it reached."""

    goal: str
    what: str
    value: float | None
    must: float
    target: float
    stretch: float
    met: str
