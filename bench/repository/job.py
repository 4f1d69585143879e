"""The main job: train on real digits, time the optimizer step, and write a report.

python3 bench/run.py job [--seeds N] [--out DIR] [--quick] [--device auto|cpu|cuda]

Of what the papers claim: papers.py; of CIFAR: cifar.py.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from rich.console import Console

from ..env import machine
from ..measure import baselines, case, ceilings, progress
from ..measure.clocks import Effort, Tell
from ..report import plots, tables
from ..report.results import Results, assemble, save
from . import digits, report

LISTS = {"cpu": ("gpt2-small-cpu", "small-1000"), "cuda": ("gpt2-124m", "small-1000")}


def main(options: argparse.Namespace) -> int:
    console = Console()
    try:
        return _run(options, console)
    except digits.CurvesDifferError as error:
        console.print(f"FAILED: {error}", style="bold red")
        return 1


def _run(options: argparse.Namespace, console: Console) -> int:
    device = machine.pick_device(options.device)
    head = machine.describe(device)
    console.rule(f"fusedcalib on {head.short_name}")
    with progress.showing() as tell:
        found = _measure(options, head, device, tell)
    options.out.mkdir(parents=True, exist_ok=True)
    files = [
        save(found, options.out / "results.json"),
        plots.training(found, options.out / "training.png"),
        plots.steps(found, options.out / "steps.png"),
        report.write(found, options.out / "report.md"),
    ]
    _show(found, console)
    for file in files:
        console.print(f"wrote {file}", highlight=False)
    for line in found.wrong:
        console.print(f"FAILED: {line}", style="bold red")
    console.print(f"{found.seconds:.0f} s")
    return 1 if found.wrong else 0


def _measure(options: argparse.Namespace, head: machine.Head, device: torch.device, tell: Tell) -> Results:
    """All measurements; `tell` is told what is being done."""
    start = time.monotonic()
    effort = Effort(rounds=4, seconds=2) if options.quick else Effort(20, 5)
    seeds = options.seeds or (2 if options.quick else 8)
    left = itertools.count(1)

    def trained() -> None:
        tell("training on digits", next(left) / (seeds * len(digits.NAMES)))

    e1 = digits.experiment(seeds, device, trained)
    cases = []
    for name in LISTS[device.type]:
        tell(f"timing {name}", 0.0)
        cases.append(case.run(case.Case(name, baselines.CORE), device, effort))
    tell("memory bandwidth", 0.0)
    ceil = ceilings.measure(device)
    return assemble(head, ceil, cases, e1=e1, seconds=round(time.monotonic() - start, 1))


def _show(found: Results, console: Console) -> None:
    assert found.e1 is not None
    tables.show(tables.training_table(found.e1), "Training on real digits")
    for line in report.training(found.e1)[3:]:
        console.print(line, highlight=False)
    for one in found.cases:
        tables.show(tables.case_table(one), one.title)
        for line in one.missing:
            console.print(f"not measured: {line}", style="yellow", highlight=False)
    if found.disturbed:
        console.print(tables.BUSY, style="yellow")
    console.print(f"measured on {found.measured_on}", highlight=False)
