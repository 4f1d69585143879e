"""The main job: train on real digits, time the optimizer step, and write a report.

python3 bench/run.py job [--seeds N] [--out DIR] [--quick] [--device auto|cpu|cuda]

Of what the papers claim: papers.py; of CIFAR: cifar.py.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.console import Console

from ..env import machine
from ..measure import baselines, case, ceilings
from ..report import plot_steps, plots, tables
from ..report.results import assemble, save
from . import digits, report

LISTS = {"cpu": ("gpt2-small-cpu", "small-1000"), "cuda": ("gpt2-124m", "small-1000")}


def main(options: argparse.Namespace) -> int:
    options.seeds = options.seeds or (2 if options.quick else 8)
    console = Console()
    try:
        return _run(options, console)
    except digits.CurvesDifferError as error:
        console.print(f"FAILED: {error}", style="bold red")
        return 1


def _run(options: argparse.Namespace, console: Console) -> int:
    start = time.monotonic()
    device = machine.pick_device(options.device)
    head = machine.describe(device)
    console.rule(f"fusedcalib on {machine.short_name(head)}")
    measured = _measure(options, device, console)
    everything = assemble(head, **measured)
    everything["seconds"] = round(time.monotonic() - start, 1)
    options.out.mkdir(parents=True, exist_ok=True)
    files = [
        save(everything, options.out / "results.json"),
        plots.training(everything, options.out / "training.png"),
        plot_steps.steps(everything, options.out / "steps.png"),
        report.write(everything, options.out / "report.md"),
    ]
    _show(everything, console)
    for file in files:
        console.print(f"wrote {file}", highlight=False)
    return _verdict(everything, console)


def _measure(options: argparse.Namespace, device: Any, console: Console) -> dict[str, Any]:
    """All measurements, under one progress bar."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    effort = case.Effort(rounds=4, seconds=2) if options.quick else case.Effort(20, 5)
    lists = LISTS[device.type]
    columns = (TextColumn("{task.description:<32}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        training = progress.add_task("training on digits", total=options.seeds * len(digits.NAMES))
        e1 = digits.experiment(options.seeds, device, lambda: progress.advance(training))
        timing = progress.add_task("timing", total=len(lists) + 1)
        cases = []
        for name in lists:
            progress.update(timing, description=f"timing {name}")
            cases.append(case.run(case.Case(name, baselines.CORE), device, effort))
            progress.advance(timing)
        progress.update(timing, description="memory bandwidth")
        ceil = ceilings.measure(device)
        progress.update(timing, advance=1, description="timing")
    return {"e1": e1, "cases": cases, "ceil": ceil}


def _show(everything: dict[str, Any], console: Console) -> None:
    tables.show(tables.training_table(everything["e1"]), "Training on real digits")
    for line in report.training(everything["e1"])[3:]:
        console.print(line, highlight=False)
    for found in everything["cases"]:
        tables.show(tables.case_table(found), tables.case_title(found))
        for line in tables.not_measured(found):
            console.print(f"not measured: {line}", style="yellow", highlight=False)
    if any(tables.was_disturbed(case) for case in everything["cases"]):
        note = f"{tables.DISTURBED} other programs were running: do not rely on such a number"
        console.print(note, style="yellow")
    console.print(f"measured on {tables.measured_on(everything)}", highlight=False)


def _verdict(everything: dict[str, Any], console: Console) -> int:
    """Non-zero if one of our own methods could not be measured, or was wrong."""
    bad = [
        f"{row['title']} on {case['list']}: {row['reason']}"
        for case in everything["cases"]
        for row in case["methods"]
        if row["name"].startswith("own") and row["reason"]
    ]
    for line in bad:
        console.print(f"FAILED: {line}", style="bold red")
    console.print(f"{everything['seconds']:.0f} s")
    return 1 if bad else 0
