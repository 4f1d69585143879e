"""The results file: one JSON a run, checked when it is written and when it is read.

What has no default must be in a file; newer fields have one, so that older files can be read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..env.machine import Head
from .data import made
from .records import Failure, GoalValue, HostCase, Spread, Training

SPEEDS = ("wall_ms", "device_ms_median", "host_us", "gbs", "pct_copy", "pct_4r3w", "pct_stream")


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
    bytes_per_param: float | None = None
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
    """A case: one rule on one list of parameters."""

    list: str
    tensors: int
    params: int
    dtypes: str
    bytes_per_param: float
    flush: str
    clock: str
    methods: Rows
    subject: str = "AdamW"
    extras: str = ""  # what it is about besides its rule
    base: str | None = "torch_fused"  # the method that the others are compared with
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
    def base_title(self) -> str:
        """What tables call the method that the others are compared with."""
        return next((row.title for row in self.methods if row.name == self.base), "-")

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
    """All that a run has found."""

    torch_mta: dict[str, Any] | None  # how much torch's fused kernel takes at once
    ceil: dict[str, Any]  # the machine's own limits
    cases: list[Measured]
    host: list[HostCase] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    goals: list[GoalValue] = field(default_factory=list)
    e1: Training | None = None  # the experiment of the main job
    seconds: float | None = None
    incomplete: bool = False

    def add_bandwidths(self) -> None:
        """Says each time as bandwidth too: in GB/s, and as shares of the ceilings."""
        copy, stream = (self.ceil.get(of) for of in ("copy_gbs", "stream_4r3w_gbs"))
        for case in self.cases:
            for row in case.methods:
                milliseconds = row.device_ms_median if case.on_gpu else row.wall_ms
                if milliseconds:
                    row.gbs = (
                        1e-6 * (row.bytes_per_param or case.bytes_per_param) * case.params / milliseconds
                    )
                    row.pct_copy = 100 * row.gbs / copy if copy else None
                    row.pct_4r3w = 100 * row.gbs / stream if stream else None

    @property
    def disturbed(self) -> bool:
        return any(case.disturbed for case in self.cases)

    @property
    def wrong(self) -> list[str]:
        """Our own methods that did not pass, over all cases."""
        return [line for case in self.cases for line in case.wrong]

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
    """A run of these cases, with its bandwidths."""
    results = Results(**vars(head), torch_mta=None, ceil=ceil, cases=cases, **more)
    results.add_bandwidths()
    return results


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
