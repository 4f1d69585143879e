"""Writes the README's benchmark section from a results file: a table of ratios and a figure.

python3 bench/run.py readme [RESULTS.json] [--readme README.md]

Only what stands between the two markers is replaced. Without a file the newest one is taken.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..env import machine
from ..measure import host
from ..report import tables
from ..report.results import Results, extras_of, load

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
FIGURE_LISTS = ("gpt2-124m", "gpt2-small-cpu", "resnet50", "small-1000")
LOSS = 1.02  # slower than torch fused by more than this is said to be so
COLUMNS = (
    ("fusedcalib / torch fused", "own_plain", "torch_fused"),
    ("with GC / torch fused without", "own_gc", "torch_fused"),
    ("with GC / eager GC + torch fused", "own_gc", "eager_gc_fused"),
)


def section(data: Results, figure: str, of_chain: str, of_rules: str, apart: Results | None = None) -> str:
    """The text between the markers. `apart`: where the host's work was measured, if not with the rest."""
    parts = [f"Ratios of the time of an AdamW step, {_clock(data)}: below 1 is faster."]
    parts += [tables.markdown(table(data)), f"![time of a step]({figure})", losses(data)]
    parts += chain(data, of_chain)
    parts += host_times(data, apart)
    parts += rules(data, of_rules)
    rounds = [s["n"] for c in data["cases"] for r in c["methods"] for s in r["ratio_to"].values()]
    parts.append(
        f"Median (10-90 %) of ratios within {min(rounds)} to {max(rounds)} interleaved rounds. "
        f"Measured on {tables.measured_on(data)}."
    )
    if any(tables.was_disturbed(case) for case in data["cases"]):
        parts.append(f"`{tables.DISTURBED}`: the machine was not quiet.")
    return "\n\n".join(parts)


def table(data: Results) -> tables.Table:
    header = ["parameters", *(title for title, _, _ in COLUMNS)]
    rows = []
    for case in data["cases"]:
        if (case["dtypes"], case["subject"], extras_of(case)) != ("fp32", "AdamW", ""):
            continue
        by_name = {row["name"]: row for row in case["methods"]}
        spreads = [by_name.get(name, {"ratio_to": {}})["ratio_to"].get(to) for _, name, to in COLUMNS]
        if any(spreads):
            title = f"{case['list']} ({case['tensors']} tensors, {case['params'] / 1e6:.3g}M)"
            rows.append([title, *map(tables.spread_text, spreads)])
    return header, rows


def losses(data: Results) -> str:
    """Where fusedcalib is slower than torch's plain fused step, in a sentence."""
    worse = [
        f"{_subject(case)}{case['list']} {case['dtypes']} "
        f"{'with' if row['name'] == 'own_gc' else 'without'} GC "
        f"({row['ratio_to']['torch_fused']['median']:.2f})"
        for case in data["cases"]
        for row in case["methods"]
        if row["name"] in ("own_plain", "own_gc")
        and not extras_of(case)
        and row["ratio_to"].get("torch_fused", {"median": 0})["median"] > LOSS
    ]
    if not worse:
        return f"Slower than torch's plain fused step by more than {LOSS - 1:.0%}: nowhere here."
    return f"Slower than torch's plain fused step: {', '.join(worse)}."


def _subject(case: dict[str, Any]) -> str:
    return "" if case["subject"] == "AdamW" else f"{case['subject']} on "


def chain(data: Results, figure: str) -> list[str]:
    """What clip, noise, centring and average cost in the step, against the same composed."""
    cases = tables.chain_cases(data)
    if not cases:
        return []
    about = (
        f"AdamW on {cases[0]['list']}, fp32 unless said, with what else a training does around a step. "
        "`bytes`: what the step with it must move for each parameter."
    )
    return [about, tables.markdown(tables.chain_table(data)), f"![a step with more]({figure})"]


RULE_COLUMNS = (
    ("fusedcalib / torch fused", "own_plain", "torch_fused"),
    ("/ torch foreach", "own_plain", "torch_foreach"),
)


def rules(data: Results, figure: str) -> list[str]:
    """Every rule against torch.optim's class of its name, and against the memory stream of its bytes."""
    cases = tables.rule_cases(data)
    if not cases:
        return []
    header = ["rule", "bytes", *(title for title, _, _ in RULE_COLUMNS), "/ stream", "with GC / stream"]
    rows = []
    for case in cases:
        by_name = {row["name"]: row["ratio_to"] for row in case["methods"]}
        over_torch = [by_name.get(name, {}).get(to) for _, name, to in RULE_COLUMNS]
        streams = [tables.over_stream(case, name) for name in ("own_plain", "own_gc")]
        cells = map(tables.spread_text, (*over_torch, *streams))
        rows.append([case["subject"], str(case["bytes_per_param"]), *cells])
    about = (
        f"Every rule on {cases[0]['list']}, fp32. `bytes`: what a step must move for each parameter; "
        "`stream`: reading and writing as many and computing nothing; `-`: torch.optim has no such form."
    )
    return [about, tables.markdown((header, rows)), f"![every rule]({figure})"]


def host_times(data: Results, apart: Results | None) -> list[str]:
    """What a step costs before the work itself: many tensors of one element; measured apart, if it was."""
    lines = host.lines((apart or data)["host"] or [])
    if not lines:
        return []
    where = f" ({tables.measured_on(apart)})" if apart else ""
    text = "\n".join(f"- {line}" for line in lines)
    return [f"A step over 1000 tensors of one element each{where}:\n\n{text}"]


def _clock(data: Results) -> str:
    return "on the device" if data["device"] else "on the CPU"


def insert(page: str, text: str, markers: tuple[str, str] = (BEGIN, END), name: str = "README") -> str:
    """A page with what stands between the markers replaced.

    Raises:
        ValueError: it does not hold each marker once, in order.
    """
    first, last = markers
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end) or first in rest or last in after:
        raise ValueError(f"the {name} needs {first} and {last} once each, in this order")
    return f"{before}{first}\n\n{text}\n\n{last}{after}"


def write(source: Path, readme: Path) -> Path:
    """Make the figure beside the results and put the section into the README."""
    from ..report import plot_steps, plots

    data = load(source)
    cases = [case for case in data["cases"] if not extras_of(case)]
    names = [case["list"] for case in cases if case["dtypes"] == "fp32"]
    chosen = [name for name in FIGURE_LISTS if name in names] or names[:3]
    figure, of_chain, of_rules = (
        source.parent / f"{kind}-{machine.slug(data)}.png" for kind in ("steps", "chain", "rules")
    )
    plot_steps.steps(data, figure, chosen)
    if tables.chain_cases(data):
        plots.chain(data, of_chain)
    if tables.rule_cases(data):
        plots.rules(data, of_rules)
    paths = (Path(os.path.relpath(path, readme.parent)).as_posix() for path in (figure, of_chain, of_rules))
    steps, chained, every = paths
    readme.write_text(
        insert(readme.read_text(), section(data, steps, chained, every, host.kept(machine.slug(data))))
    )
    return figure


def main(options: argparse.Namespace) -> int:
    files = sorted(machine.RESULTS.glob("*T*Z-*.json"))  # bench/gpu.sh leaves others there
    if options.source is None and not files:
        raise ValueError(f"no results in {machine.RESULTS}: run the suite first")
    print(f"wrote {options.readme} and {write(options.source or files[-1], options.readme)}")
    return 0
