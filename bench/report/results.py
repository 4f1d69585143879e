"""The results file: one JSON a run, checked when it is written and when it is read.

What has no default must be in a file; newer fields have one, so that older files can be read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from ..env.machine import Head

SPEEDS = ("wall_ms", "device_ms_median", "host_us", "gbs", "pct_copy", "pct_4r3w", "pct_stream")


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
class Row:
    """One method of a case; every number is None where it was not measured, never 0."""

    name: str
    title: str
    options: dict[str, Any]
    device_ms_median: float | None = None
    device_ms_p10: float | None = None
    device_ms_p90: float | None = None
    wall_ms: float | None = None
    host_us: float | None = None
    launches: int | None = None
    peak_extra_bytes: int | None = None
    pct_stream: float | None = None
    max_err_vs_fp64: float | None = None
    kept: int | None = None
    dropped: int | None = None
    ratio_to: dict[str, Spread] = field(default_factory=dict)
    wall_ratio_to: dict[str, Spread] = field(default_factory=dict)
    note: str = ""
    reason: str | None = None
    bytes_per_param: int | None = None
    first_steps_s: float | None = None
    gbs: float | None = None
    pct_copy: float | None = None
    pct_4r3w: float | None = None

    @property
    def own(self) -> bool:
        return self.name.startswith("own")

    @property
    def over_stream(self) -> Spread | None:
        """Time over that of the memory stream with the same traffic."""
        return next((s for to, s in self.ratio_to.items() if to.startswith("stream_")), None)


Rows = list[Row]
Names = list[str]


@dataclass
class Measured:
    """A case: one rule on one list of parameters.

    Attributes:
        extras: what it is about besides its rule.
        base: the method that the others are compared with.
    """

    list: str
    tensors: int
    params: int
    dtypes: str
    bytes_per_param: int
    flush: str
    clock: str
    methods: Rows
    subject: str = "AdamW"
    extras: str = ""
    base: str | None = "torch_fused"
    hyper: dict[str, Any] = field(default_factory=dict)
    incomplete: bool = False

    @property
    def kind(self) -> tuple[str, str, str]:
        return self.dtypes, self.subject, self.extras

    @property
    def on_gpu(self) -> bool:
        return self.clock == "device"

    @property
    def title(self) -> str:
        millions = f"{self.params / 1e6:.3g}M parameters"
        return f"{self.subject}, {self.list}: {self.tensors} tensors, {millions}, {self.dtypes}"

    @property
    def disturbed(self) -> bool:
        """Whether one of our own numbers was."""
        return any(spread.disturbed for row in self.methods if row.own for spread in row.ratio_to.values())

    @property
    def passed(self) -> Rows:
        """The methods that have numbers."""
        return [row for row in self.methods if row.reason is None]

    @property
    def missing(self) -> Names:
        """`apex FusedAdam: apex is not installed`, and so on."""
        return [f"{row.title}: {row.reason}" for row in self.methods if row.reason]

    @property
    def wrong(self) -> Names:
        """Our own methods that did not pass: of others it is news, of ours a defect."""
        where = f"{self.list} {self.subject} {self.dtypes}"
        return [f"{row.title} on {where}: {row.reason}" for row in self.methods if row.own and row.reason]

    def row(self, name: str) -> Row | None:
        """The method of that name, if it has numbers."""
        return next((row for row in self.passed if row.name == name), None)

    def ratio(self, name: str, to: str) -> Spread | None:
        """The ratio of the times of two methods, if it was measured."""
        row = self.row(name)
        return row.ratio_to.get(to) if row else None

    def over_stream(self, name: str) -> Spread | None:
        """A method's time over that of the stream of the same bytes."""
        row = self.row(name)
        return row.over_stream if row else None


@dataclass
class Results(Head):
    """All that a run has found.

    Attributes:
        ceil: the machine's own limits.
        host: what host.measure found.
        e1: the experiment of the main job.
    """

    torch_mta: dict[str, Any] | None
    ceil: dict[str, Any]
    cases: list[Measured]
    host: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    e1: dict[str, Any] | None = None
    seconds: float | None = None
    incomplete: bool = False

    @property
    def disturbed(self) -> bool:
        return any(case.disturbed for case in self.cases)

    def find(
        self, name: str, method: str, dtypes: str = "fp32", subject: str = "AdamW", extras: str = ""
    ) -> Row | None:
        """The row of a method on a list, or None if that was not measured."""
        cases = (case for case in self.cases if (case.list, *case.kind) == (name, dtypes, subject, extras))
        return next((row for case in cases if (row := case.row(method))), None)

    def ratio(self, name: str, method: str, to: str, clock: str = "ratio_to", **where: str) -> Spread | None:
        """One ratio, or None if that was not measured; `where`: more of what `find` takes."""
        row = self.find(name, method, **where)
        ratios: dict[str, Spread] = getattr(row, clock) if row else {}
        return ratios.get(to)

    @property
    def of_rules(self) -> list[Measured]:
        """The cases of all rules on the list that they share, AdamW's first."""
        cases = [case for case in self.cases if not case.extras]
        shared = {(case.list, case.dtypes) for case in cases if case.subject != "AdamW"}
        own = [case for case in cases if (case.list, case.dtypes) in shared]
        return sorted(own, key=lambda case: case.subject != "AdamW")

    @property
    def of_chains(self) -> list[Measured]:
        """The cases of a step with extras, in the order of what they move."""
        return sorted((case for case in self.cases if case.extras), key=lambda case: case.bytes_per_param)


def assemble(head: Head, ceil: dict[str, Any], cases: list[Measured], **more: Any) -> Results:
    """Put a run together, and say each time as bandwidth: in GB/s, and as shares of the ceilings."""
    for case in cases:
        for row in case.methods:
            milliseconds = row.device_ms_median if case.on_gpu else row.wall_ms
            moved = (row.bytes_per_param or case.bytes_per_param) * case.params
            row.gbs = gbs = 1e-6 * moved / milliseconds if milliseconds else None
            row.pct_copy, row.pct_4r3w = (
                100 * gbs / ceil[of] if gbs and ceil.get(of) else None
                for of in ("copy_gbs", "stream_4r3w_gbs")
            )
    return Results(**vars(head), torch_mta=None, ceil=ceil, cases=cases, **more)


def made(hint: Any, value: Any, where: str) -> Any:
    """A value of that type from what JSON has of it.

    Raises:
        ValueError: it is of another type, or something is missing; says where.
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:
        return None if value is None else made(inner[0], value, where)
    nested = is_dataclass(kind)
    accepted = (int, float) if kind is float else dict if nested else object if kind is Any else kind
    if not isinstance(value, accepted):
        raise ValueError(f"{where} is {value!r}")
    found: Any = value
    if nested:
        return hint(**dict(_fields(hint, found, where)))
    if kind is list:
        return [made(inner[0], one, f"{where} {i}") for i, one in enumerate(found)]
    return {key: made(inner[1], one, f"{where}: {key!r}") for key, one in found.items()} if inner else found


def _fields(cls: type, value: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(cls)
    for one in fields(cls):
        if one.name in value:
            yield one.name, made(hints[one.name], value[one.name], f"{where}: {one.name!r}")
        elif one.default is one.default_factory is MISSING:
            raise ValueError(f"{where} has no {one.name!r}")


def read(data: dict[str, Any]) -> Results:
    """Results from what a file has.

    Raises:
        ValueError: something is missing, is of another type, or is a number without a gate.
    """
    results: Results = made(Results, data, "results")
    if results.schema != 1:
        raise ValueError(f"results of schema {results.schema}, not 1")
    for case in results.cases:
        for row in case.methods:
            if row.reason is not None and (row.ratio_to or any(getattr(row, key) for key in SPEEDS)):
                raise ValueError(f"case {case.list!r}: {row.name!r} did not pass and has a speed")
    return results


def save(results: Results, path: Path) -> Path:
    """Check, then write; no half-written file is left, nor one with NaN, which is not JSON."""
    text = json.dumps(asdict(results), indent=1, allow_nan=False)
    read(json.loads(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


def load(path: Path) -> Results:
    return read(json.loads(path.read_text()))
