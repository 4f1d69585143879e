"""Times the step of any rule with any options on any parameter list, beside torch.optim's and others'.

python -m fusedcalib bench --quick
python -m fusedcalib bench --optimizer SGD --set momentum=0.9 --with clip,ema --model resnet50 --json out.json
python -m fusedcalib bench compare before.json after.json

docs/benchmarks.md says how to read the numbers.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec

import torch

from ..env import machine
from ..report import tables
from ..report.results import Measured
from . import choose, progress
from .case import Case
from .clocks import Effort
from .runner import INTERRUPTED, Log, Run

DEFAULT_LISTS = {"cpu": "gpt2-small-cpu", "cuda": "gpt2-124m"}
ROUNDS, SECONDS = 40, 180.0
QUICK_ROUNDS, QUICK_SECONDS = 12, 40.0


def main(options: argparse.Namespace) -> int:
    device = _device(options.device)
    cases = _cases(options, device)
    _check_files(options)
    _check_memory(cases, device)
    try:
        return _measure(cases, device, options)
    except KeyboardInterrupt:  # while a table was made, say: what was measured before is written
        return INTERRUPTED


def _measure(cases: list[Case], device: torch.device, options: argparse.Namespace) -> int:
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    budget = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    log = Log()
    head = machine.describe(device)
    print(f"{head.short_name}; torch {torch.__version__}; {len(cases)} cases, {budget:g} s")
    with progress.showing() as tell:
        work = Run(head, device, options.json, print, tell)
        work.ceilings()
        for index, case in enumerate(cases):
            left = budget - log.seconds
            if work.interrupted or (index and left <= 0):
                work.results.left_out.append(case.title)
                continue
            # Half for building, compiling and the gate; a GPU has two clocks.
            share = left / (len(cases) - index) / (4 if machine.on_gpu(device) else 2)
            measured = work.measure(case, Effort(rounds, max(1.0, share)))
            if measured is not None:
                _show(measured)
    return _finish(work, options)


def _show(measured: Measured) -> None:
    tables.show(tables.full_table(measured), measured.title)
    for line in measured.missing:
        print(f"not measured: {line}")


def _finish(work: Run, options: argparse.Namespace) -> int:
    whole = work.save()
    if whole.disturbed:
        print(tables.BUSY)
    for title in whole.left_out:
        print(f"left out{'' if work.interrupted else ', the time was over (--seconds)'}: {title}")
    if work.interrupted:
        print("interrupted: incomplete")
    if options.plot and any(case.base for case in whole.cases):
        from ..report import plots

        print(f"wrote {plots.compared(whole, options.plot)}")
    if options.json:
        print(f"wrote {options.json}")
    for line in whole.wrong:
        print(f"FAILED: {line}", file=sys.stderr)
    return work.status()


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; use --device cpu, or a build of torch with CUDA")
    return machine.pick_device(name)


def _cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    """What is asked for."""
    given = choose.options_from(options.set)
    features = choose.features_from(options.features, given)
    subjects = choose.subjects_from(options.optimizer or ["AdamW"], given)
    named = options.model or ([] if options.shapes or options.hf_config else [DEFAULT_LISTS[device.type]])
    lists = choose.lists_from(named, options.shapes, options.hf_config)
    against = options.against or list(choose.AGAINST)
    return choose.cases_from(subjects, lists, options.dtype or ["fp32"], features, against)


def _check_files(options: argparse.Namespace) -> None:
    """Refuses, before anything is measured, what could not be written."""
    for flag, path in (("--json", options.json), ("--plot", options.plot)):
        if path and not path.resolve().parent.is_dir():
            raise ValueError(f"{flag} {path}: there is no folder {path.resolve().parent}; make it first")
        if path and not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
            raise ValueError(f"{flag} {path} cannot be written")
    if options.plot and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


def _check_memory(cases: list[Case], device: torch.device) -> None:
    """Refuses a case that is larger than the memory that is free."""
    free = machine.free_bytes(device)
    for case in cases:
        needed = choose.needed_bytes(case)
        if free is not None and needed > free:
            raise ValueError(
                f"{case.title} needs {needed / 1e9:.3g} GB for {len(case.methods)} methods, "
                f"{free / 1e9:.3g} GB are free: take a smaller --model, or fewer of them with --against"
            )
