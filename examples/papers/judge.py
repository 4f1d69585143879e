"""What two sides of a comparison in papers.py found, and whether that is as expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any

import hilbert


@dataclass(frozen=True)
class Expected:
    """What a comparison should find: in a word, in words, and whether it does."""

    direction: str
    words: str
    holds: Callable[[Comparison], bool]


def better(gain: float = 0.0, wins: float = 0.5) -> Expected:
    """Less error: by more than `gain` points on average, not worse in this share of the seeds."""
    by = f" by more than {gain:g}" if gain else ""
    return Expected(
        "better",
        f"better{by}, not worse in {wins:.0%} of the seeds",
        lambda of: mean(of.differences) > gain and of.won >= wins * len(of.base),
    )


def same(within: float = 1.0) -> Expected:
    """The averages are no further apart than this, in points of error."""
    return Expected(
        "same", f"no difference: within {within:g}", lambda of: abs(mean(of.differences)) <= within
    )


def worse() -> Expected:
    """The other side has more error, on average."""
    return Expected("worse", "worse", lambda of: mean(of.differences) < 0)


def learns(above: float = 80.0, below: float = 15.0) -> Expected:
    """Only the other side learns anything: every seed's errors, in %, lie beyond these."""
    return Expected(
        "learns",
        f"from above {above:g} to below {below:g} %",
        lambda of: min(of.base) > above and max(of.other) < below,
    )


@dataclass(frozen=True)
class Comparison:
    """Test errors in % of two sides over the same seeds."""

    title: str
    base: tuple[float, ...]
    other: tuple[float, ...]
    expected: Expected = field(default_factory=better)

    @property
    def differences(self) -> list[float]:
        """Base less other: above 0 is better."""
        return [a - b for a, b in zip(self.base, self.other, strict=True)]

    @property
    def won(self) -> int:
        """Seeds in which the other side is not worse."""
        return sum(d >= 0 for d in self.differences)

    @property
    def error(self) -> float:
        """The standard error of the mean difference."""
        return stdev(self.differences) / math.sqrt(len(self.differences))

    @property
    def holds(self) -> bool:
        """Whether what is expected was found."""
        return self.expected.holds(self)

    def record(self) -> dict[str, Any]:
        return {
            "kind": "errors",
            "title": self.title,
            "base": self.base,
            "other": self.other,
            "difference": mean(self.differences),
            "standard_error": self.error,
            "not_worse": self.won,
            "expected": self.expected.words,
            "direction": self.expected.direction,
            "holds": self.holds,
        }


@dataclass(frozen=True)
class Retrace:
    """A published curve and the same computed here."""

    title: str
    published: tuple[float, ...]
    found: tuple[float, ...]
    tolerance: float = hilbert.TOLERANCE

    @property
    def largest(self) -> float:
        """The largest relative difference."""
        return max(abs(b / a - 1) for a, b in zip(self.published, self.found, strict=True))

    @property
    def holds(self) -> bool:
        return self.largest < self.tolerance

    def record(self) -> dict[str, Any]:
        return {
            "kind": "curve",
            **asdict(self),
            "largest": self.largest,
            "expected": f"within {self.tolerance:g} of each value",
            "holds": self.holds,
        }
