"""Writes the README's benchmark section from a results file: a table of ratios and a figure.

python3 bench/run.py readme [RESULTS.json] [--readme README.md]

Only what stands between the two markers is replaced. Without a file the newest one is taken.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..env import machine
from ..measure import host
from ..report import tables
from ..report.records import HostTimes
from ..report.results import Measured, Results, load

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
FIGURE_LISTS = ("gpt2-124m", "gpt2-small-cpu", "resnet50", "small-1000")
LOSS = 1.02  # slower than torch fused by more than this is said to be so


def section(data: Results, figures: Sequence[str], apart: HostTimes | None = None) -> str:
    """The text between the markers. `apart`: where the host's work was measured, if not with the rest."""
    steps, chained, every = figures
    clock = "on the device" if data.device else "on the CPU"
    parts = [f"Ratios of the time of an AdamW step, {clock}: below 1 is faster."]
    parts += [tables.markdown(table(data)), f"![time of a step]({steps})", losses(data)]
    parts += [*chain(data, chained), *host_times(data, apart), *rules(data, every)]
    rounds = [spread.n for case in data.cases for row in case.methods for spread in row.ratio_to.values()]
    parts.append(
        f"Median (10-90 %) of ratios within {min(rounds)} to {max(rounds)} interleaved rounds. "
        f"Measured on {data.measured_on}."
    )
    if data.disturbed:
        parts.append(f"`{tables.DISTURBED}`: the machine was not quiet.")
    return "\n\n".join(parts)


def _over(name: str, to: str) -> Callable[[Measured], str]:
    return lambda case: tables.spread_text(case.ratio(name, to))


def table(data: Results) -> tables.Table:
    columns: tables.Columns[Measured] = {
        "parameters": lambda case: f"{case.list} ({case.tensors} tensors, {case.params / 1e6:.3g}M)",
        "fusedcalib / torch fused": _over("own_plain", "torch_fused"),
        "with GC / torch fused without": _over("own_gc", "torch_fused"),
        "with GC / eager GC + torch fused": _over("own_gc", "eager_gc_fused"),
    }
    header, rows = tables.table_of((c for c in data.cases if c.kind == ("fp32", "AdamW", "")), columns)
    return header, [row for row in rows if row[1:] != ["-"] * 3]


def losses(data: Results) -> str:
    """Where fusedcalib is slower than torch's plain fused step, in a sentence."""
    worse = [
        f"{'' if case.subject == 'AdamW' else f'{case.subject} on '}{case.list} {case.dtypes} "
        f"{'with' if row.name == 'own_gc' else 'without'} GC ({row.ratio_to['torch_fused'].median:.2f})"
        for case in data.cases
        for row in case.methods
        if row.name in ("own_plain", "own_gc") and not case.extras and "torch_fused" in row.ratio_to
        if row.ratio_to["torch_fused"].median > LOSS
    ]
    if not worse:
        return f"Slower than torch's plain fused step by more than {LOSS - 1:.0%}: nowhere here."
    return f"Slower than torch's plain fused step: {', '.join(worse)}."


def chain(data: Results, figure: str) -> list[str]:
    """What clip, noise, centring and average cost in the step, against the same composed."""
    if not data.of_chains:
        return []
    about = (
        f"AdamW on {data.of_chains[0].list}, fp32 unless said, with what else a training does around a step. "
        "`bytes`: what the step with it must move for each parameter."
    )
    return [about, tables.markdown(tables.chain_table(data)), f"![a step with more]({figure})"]


def rules(data: Results, figure: str) -> list[str]:
    """Every rule against torch.optim's class of its name, and against the memory stream of its bytes."""
    if not data.of_rules:
        return []

    def over_stream(name: str) -> Callable[[Measured], str]:
        return lambda case: tables.spread_text(case.over_stream(name))

    columns: tables.Columns[Measured] = {
        "rule": lambda case: case.subject,
        "bytes": lambda case: f"{case.bytes_per_param:g}",
        "fusedcalib / torch fused": _over("own_plain", "torch_fused"),
        "/ torch foreach": _over("own_plain", "torch_foreach"),
        "/ stream": over_stream("own_plain"),
        "with GC / stream": over_stream("own_gc"),
    }
    about = (
        f"Every rule on {data.of_rules[0].list}, fp32. `bytes`: what a step must move for each parameter; "
        "`stream`: reading and writing as many and computing nothing; `-`: torch.optim has no such form."
    )
    return [about, tables.markdown(tables.table_of(data.of_rules, columns)), f"![every rule]({figure})"]


def host_times(data: Results, apart: HostTimes | None) -> list[str]:
    """What a step costs before the work itself: many tensors of one element; measured apart, if it was."""
    lines = host.lines(apart.host if apart else data.host)
    if not lines:
        return []
    where = f" ({apart.measured_on})" if apart else ""
    text = "\n".join(f"- {line}" for line in lines)
    return [f"A step over 1000 tensors of one element each{where}:\n\n{text}"]


def insert(page: str, text: str, markers: tuple[str, str] = (BEGIN, END), name: str = "README") -> str:
    """A page with what stands between the markers replaced."""
    first, last = markers
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end) or first in rest or last in after:
        raise ValueError(f"the {name} needs {first} and {last} once each, in this order")
    return f"{before}{first}\n\n{text}\n\n{last}{after}"


def write(source: Path, readme: Path) -> Path:
    """Make the figures beside the results and put the section into the README."""
    from ..report import plots

    data = load(source)
    names = [case.list for case in data.cases if case.dtypes == "fp32" and not case.extras]
    chosen = [name for name in FIGURE_LISTS if name in names] or names[:3]
    figures = [source.parent / f"{kind}-{data.slug}.png" for kind in ("steps", "chain", "rules")]
    plots.steps(data, figures[0], chosen)
    if data.of_chains:
        plots.chain(data, figures[1])
    if data.of_rules:
        plots.rules(data, figures[2])
    paths = [Path(os.path.relpath(path, readme.parent)).as_posix() for path in figures]
    readme.write_text(insert(readme.read_text(), section(data, paths, host.kept(data.slug))))
    return figures[0]


def main(options: argparse.Namespace) -> int:
    files = sorted(machine.RESULTS.glob("*T*Z-*.json"))  # bench/gpu.sh leaves others there
    if options.source is None and not files:
        raise ValueError(f"no results in {machine.RESULTS}: run the suite first")
    print(f"wrote {options.readme} and {write(options.source or files[-1], options.readme)}")
    return 0
