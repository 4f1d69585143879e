"""Two results files of one machine: what has become slower or faster beyond the noise of either.

python -m fusedcalib bench compare before.json after.json

Milliseconds of two runs are never compared: a machine is not as fast today as it was yesterday. What is
compared is the ratio of a method to the one that it took turns with, in the one run and in the other.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..report import tables
from ..report.records import Spread
from ..report.results import Measured, Results, load

SLOWER, FASTER, SAME, UNKNOWN = "slower", "faster", "no difference", "not known"
LEAST = 0.02  # a smaller change is none, however sure
SURE = 3.0  # standard errors: many methods are compared at once, and each may be wrong
ENOUGH = 5  # rounds
TAILS = 2.563  # standard deviations between the 10th and the 90th percentile of a normal distribution
OF_MEDIAN = 1.2533  # the standard error of a median over that of a mean


@dataclass(frozen=True)
class Change:
    """One method of one case in both files."""

    case: str
    method: str
    to: str
    ratio: float  # how many times as long as before
    low: float  # where it may be, by the spread of the rounds
    high: float
    verdict: str
    own: bool  # whether it is one of ours, which alone make the exit status


def changes(before: Results, after: Results, least: float = LEAST) -> list[Change]:
    """Every method that both files have in the same case."""
    old = {_key(case): case for case in before.cases}
    found = []
    for case in after.cases:
        if _key(case) in old:
            found += list(_of_case(old[_key(case)], case, least))
    return found


def _key(case: Measured) -> tuple[Any, ...]:
    return case.list, case.tensors, case.params, *case.kind, case.clock, case.flush


def _of_case(before: Measured, after: Measured, least: float) -> Iterator[Change]:
    old = {row.name: row.ratio_to for row in before.methods}
    titles = {row.name: row.title for row in after.methods}
    for row in after.methods:
        was, now = old.get(row.name, {}), row.ratio_to
        to = _reference(was.keys() & now.keys(), after.base)
        if to is not None:
            ratio, low, high = _interval(was[to], now[to])
            verdict = _verdict(was[to], now[to], low, high, least)
            yield Change(after.title, row.title, titles.get(to, to), ratio, low, high, verdict, row.own)


def _reference(shared: set[str], base: str | None) -> str | None:
    """What a method is held against: the case's base, or else the memory stream, or else another's step."""
    if base in shared:
        return base
    others = sorted(name for name in shared if not name.startswith("own"))
    return next((name for name in others if name.startswith("stream_")), others[0] if others else None)


def _interval(before: Spread, after: Spread) -> tuple[float, float, float]:
    """The ratio of two medians, and how far off it may be by the spread of the rounds."""
    ratio = after.median / before.median
    far = math.exp(SURE * math.hypot(_error(before), _error(after)))
    return ratio, ratio / far, ratio * far


def _error(spread: Spread) -> float:
    """The standard error of a median, as a share of it."""
    deviation = math.log(spread.p90 / spread.p10) / TAILS
    return OF_MEDIAN * deviation / math.sqrt(spread.n)


def _verdict(before: Spread, after: Spread, low: float, high: float, least: float) -> str:
    if any(spread.disturbed or spread.n < ENOUGH for spread in (before, after)):
        return UNKNOWN
    if low > 1 + least:
        return SLOWER
    return FASTER if high < 1 / (1 + least) else SAME


def differences(before: Results, after: Results) -> list[str]:
    """What forbids the comparison: another device, processor or build of torch."""

    def facts(results: Results) -> dict[str, Any]:
        device, cpu, versions = results.device or {}, results.cpu, results.versions
        return {
            "the GPU": device.get("name"),
            "the processor": cpu.get("name"),
            "the number of cores": cpu.get("cores"),
            "the number of threads": cpu.get("threads"),
            "torch": versions.get("torch"),
            "CUDA": versions.get("cuda"),
        }

    old, new = facts(before), facts(after)
    return [f"{name} ({old[name]} and {new[name]})" for name in old if old[name] != new[name]]


def table(found: list[Change]) -> tables.Table:
    columns: tables.Columns[Change] = {
        "method": lambda change: change.method,
        "on": lambda change: change.case,
        "over": lambda change: change.to,
        "after / before (interval)": lambda c: f"{c.ratio:.3f} ({c.low:.3f}-{c.high:.3f})",
        "verdict": lambda change: change.verdict,
    }
    return tables.table_of(found, columns)


def main(options: argparse.Namespace) -> int:
    """Returns 1 where one of ours is slower, 2 where nothing could be told."""
    before, after = load(options.before), load(options.after)
    other = differences(before, after)
    if other and not options.force:
        raise ValueError(f"different: {', '.join(other)}; measure both on one machine, or add --force")
    found = changes(before, after, options.least)
    if not found:
        raise ValueError("no method of one case is in both files: measure both with the same options")
    for line in other:
        print(f"different: {line}")
    tables.show(table(found))
    return _status(found)


def _status(found: list[Change]) -> int:
    ours = [change for change in found if change.own]
    for change in found:
        if not change.own and change.verdict in (SLOWER, FASTER):
            print(f"not of ours, and also {change.verdict}: {change.method}; perhaps the machine has changed")
    if slower := [change for change in ours if change.verdict == SLOWER]:
        print(f"slower: {', '.join(f'{c.method} ({c.ratio:.2f})' for c in slower)}")
        return 1
    if all(change.verdict == UNKNOWN for change in ours):
        print(
            f"nothing can be told: in each, fewer than {ENOUGH} rounds, or other programs were running",
            file=sys.stderr,
        )
        return 2
    return 0
