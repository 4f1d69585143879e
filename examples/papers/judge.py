"""What two sides of a comparison in papers.py found, and whether that is as expected."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any

import hilbert


@dataclass(frozen=True)
class Better:
    """The other side has less error.

    Attributes:
        gain: by how much on average, at least, in points of error.
        wins: in which share of the seeds it must not be worse.
    """

    gain: float = 0.0
    wins: float = 0.5

    def __str__(self) -> str:
        by = f" by more than {self.gain:g}" if self.gain else ""
        return f"better{by}, not worse in {self.wins:.0%} of the seeds"

    def holds(self, of: Comparison) -> bool:
        return mean(of.differences) > self.gain and of.won >= self.wins * len(of.base)


@dataclass(frozen=True)
class Same:
    """The averages are no further apart than this, in points of error."""

    within: float = 1.0

    def __str__(self) -> str:
        return f"no difference: within {self.within:g}"

    def holds(self, of: Comparison) -> bool:
        return abs(mean(of.differences)) <= self.within


@dataclass(frozen=True)
class Worse:
    """The other side has more error, on average."""

    def __str__(self) -> str:
        return "worse"

    def holds(self, of: Comparison) -> bool:
        return mean(of.differences) < 0


@dataclass(frozen=True)
class Learns:
    """Only the other side learns anything: every seed's errors, in %, lie beyond these."""

    above: float = 80.0
    below: float = 15.0

    def __str__(self) -> str:
        return f"from above {self.above:g} to below {self.below:g} %"

    def holds(self, of: Comparison) -> bool:
        return min(of.base) > self.above and max(of.other) < self.below


@dataclass(frozen=True)
class Comparison:
    """Test errors in % of two sides over the same seeds."""

    title: str
    base: tuple[float, ...]
    other: tuple[float, ...]
    expected: Better | Same | Worse | Learns = field(default_factory=Better)

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
            "expected": str(self.expected),
            "direction": type(self.expected).__name__.lower(),
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
