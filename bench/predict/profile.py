"""What the kernels of a step take of a GPU: compiled for one that need not be there, or measured on one.

python -m fusedcalib profile --arch sm_90 --model llama3-8b --options centralize,max_grad_norm
python3 bench/run.py profile --arch sm_90 --optimizer all --everything --json profile.json --plot profile.png

docs/profile.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..measure.method import SUBJECTS
from ..models import architectures
from ..report import tables
from . import profile_gpu, profile_static, profile_steps
from .gpus import GPUS
from .profile_steps import ProfileCase, everything

Results = dict[str, Any]
DEFAULT = "sm_90"
NOTE = (
    "On paper: registers, accesses and instructions are those of the compiled code, bytes what the step must "
    "move, times the published bandwidth and issue rate of bench/predict/gpus.py; no GPU was measured."
)


def kernels_table(found: Results) -> tables.Table:
    """Each kernel of a step."""

    def widths(kernel: Results) -> str:
        ends = sorted({kernel["narrowest"], kernel["widest"]} - {None}, reverse=True)
        return " to ".join(map(str, ends)) or "-"

    columns: tables.Columns[Results] = {
        **profile_static.COLUMNS,
        "registers": lambda kernel: str(kernel["registers"]),
        "spilled B": lambda kernel: str(kernel["spilled"]),
        "warps": lambda kernel: "{warps}/{most}".format(**kernel["occupancy"]),
        "KB in flight": lambda kernel: f"{kernel['in_flight'] / 1024:.0f}",
        "access B": widths,
        "bytes": lambda kernel: str(kernel["bytes"]),
        "instr.": lambda kernel: f"{kernel['instructions']:.1f}",
        "memory ms": lambda kernel: tables.milliseconds(kernel["seconds"]["memory"]),
        "issue ms": lambda kernel: tables.milliseconds(kernel["seconds"]["issue"]),
        "bound by": lambda kernel: kernel["bound"] if kernel["elements"] else "-",
    }
    return tables.table_of(found["kernels"], columns)


def totals_table(results: Results) -> tables.Table:
    """The totals of each step."""
    columns: tables.Columns[Results] = {
        "step": profile_steps.case_title,
        "launches": lambda found: str(found["launches"]),
        "bytes a parameter": lambda found: f"{found['moved_per_param']:.1f}",
        "GB moved": lambda found: f"{found['moved'] / 1e9:.3g}",
        "most registers": lambda found: str(max(kernel["registers"] for kernel in found["kernels"])),
        "spilled B": lambda found: str(sum(kernel["spilled"] for kernel in found["kernels"])),
        "memory ms": lambda found: tables.milliseconds(found["seconds"]["memory"]),
        "issue ms": lambda found: tables.milliseconds(found["seconds"]["issue"]),
        "at least ms": lambda found: tables.milliseconds(found["seconds"]["bound"]),
    }
    return tables.table_of(results["cases"], columns)


def show(results: Results) -> None:
    """Prints the tables."""
    print(profile_static.title(results))
    for found in results["cases"]:
        print(f"\n{profile_steps.case_title(found)}:")
        tables.show(kernels_table(found), width=170)
    print("\nEach step:")
    tables.show(totals_table(results))
    print(NOTE)


# -- the command


def main(options: argparse.Namespace) -> int:
    if options.accept or options.check:
        from . import profile_kept

        return profile_kept.main(options.accept)
    model = architectures.chosen(options)
    target = _target(options)
    device = None if target else profile_gpu.here()
    if device is not None:
        results = profile_gpu.profile(_cases(options), model, device, _teller(options.json))
    else:
        if target is None:
            target = DEFAULT
            print(f"No GPU is here to measure on: this is the static profile, compiled for {target}.")
        results = profile_static.profile(_cases(options), model, _gpu(options, target))
        show(results)
    _write(results, options.json)
    if failed := [f"{one['case']}: {one['error']}" for one in results.get("failures", ())]:
        raise ValueError("; ".join(failed))
    if options.plot:
        from . import plots

        (plots.profile if device is None else plots.measured)(results, options.plot)
    return 0


def _teller(path: Path | None) -> Callable[[Results], None]:
    """Shows and writes each case of a GPU when it is measured: what ends it early costs the rest only."""
    shown = 0

    def told(results: Results) -> None:
        nonlocal shown
        if not shown and results["cases"]:
            print(profile_gpu.title(results))
        for found in results["cases"][shown:]:
            profile_gpu.show(found)
        sys.stdout.flush()
        shown = len(results["cases"])
        _write(results, path)

    return told


def _write(results: Results, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _target(options: argparse.Namespace) -> str | None:
    """What is compiled for, where that is named; else a GPU is measured, if one is here."""
    target: str | None = options.arch or (options.gpu and GPUS[options.gpu].target)
    return target


def _gpu(options: argparse.Namespace, target: str) -> str:
    """The GPU whose bandwidth is taken: the one that is named, or the first of the architecture."""
    if options.gpu is None:
        return next(name for name, gpu in GPUS.items() if gpu.target == target)
    if GPUS[options.gpu].target != target:
        of_target = ", ".join(name for name, gpu in GPUS.items() if gpu.target == target)
        raise ValueError(f"--gpu {options.gpu} is no {target}; of that are {of_target}")
    name: str = options.gpu
    return name


def _cases(options: argparse.Namespace) -> list[ProfileCase]:
    names = list(SUBJECTS) if options.optimizer == ["all"] else options.optimizer
    unknown = [name for name in names if name not in SUBJECTS]
    if unknown:
        raise ValueError(f"--optimizer {unknown[0]!r} is not known; there are all, {', '.join(SUBJECTS)}")
    cases = []
    for dtypes in options.dtypes:
        for name in names:
            cases.append(ProfileCase(name, options.options, dtypes))
            if options.everything:
                cases.append(ProfileCase(name, everything(dtypes), dtypes))
    return cases
