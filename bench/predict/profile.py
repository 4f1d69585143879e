"""What the kernels of a step take of a GPU: compiled for one that need not be there, or measured on one.

python -m fusedcalib profile --arch sm_90 --model llama3-8b --options centralize,max_grad_norm
python3 bench/run.py profile --arch sm_90 --optimizer all --everything --json profile.json --plot profile.png

docs/profile.md says how to read it.
"""

from __future__ import annotations

import argparse
import sys

import torch

from ..measure.method import SUBJECTS
from ..models import architectures
from ..models.architectures import Model
from ..report.data import write
from . import profile_gpu, profile_static
from .gpus import GPUS
from .profile_steps import ProfileCase, everything

DEFAULT = "sm_90"


def main(options: argparse.Namespace) -> int:
    if options.accept or options.check:
        from . import profile_kept

        return profile_kept.main(options.accept)
    model, target = architectures.chosen(options), _target(options)
    device = None if target else profile_gpu.here()
    if device is not None:
        _measure(options, model, device)
        return 0
    if target is None:
        target = DEFAULT
        print(f"No GPU is here to measure on: this is the static profile, compiled for {target}.")
    found = profile_static.profile(_cases(options), model, _gpu(options, target))
    profile_static.show(found)
    write(found, options.json)
    if options.plot:
        from . import plots

        plots.profile(found, options.plot)
    return 0


def _measure(options: argparse.Namespace, model: Model, device: torch.device) -> None:
    """Shows and writes each case when it is measured: what ends it early costs the rest only."""

    def told(results: profile_gpu.GpuProfile, case: profile_gpu.GpuCase | None) -> None:
        if case is not None:
            if len(results.cases) == 1:
                print(results.title)
            profile_gpu.show(case)
            sys.stdout.flush()
        write(results, options.json)

    found = profile_gpu.profile(_cases(options), model, device, told)
    if found.failures:
        raise ValueError("; ".join(f"{one.case}: {one.error}" for one in found.failures))
    if options.plot:
        from . import plots

        plots.measured(found, options.plot)


def _target(options: argparse.Namespace) -> str | None:
    """What is compiled for, where that is named; else a GPU is measured, if one is here."""
    target: str | None = options.arch or (options.gpu and GPUS[options.gpu].target)
    return target


def _gpu(options: argparse.Namespace, target: str) -> str:
    """The GPU whose bandwidth is taken: the one that is named, or the first of the architecture."""
    of_target = [name for name, gpu in GPUS.items() if gpu.target == target]
    name: str = options.gpu or of_target[0]
    if name not in of_target:
        raise ValueError(f"--gpu {name} is no {target}; of that are {', '.join(of_target)}")
    return name


def _cases(options: argparse.Namespace) -> list[ProfileCase]:
    names = list(SUBJECTS) if options.optimizer == ["all"] else options.optimizer
    if unknown := [name for name in names if name not in SUBJECTS]:
        raise ValueError(f"--optimizer {unknown[0]!r} is not known; there are all, {', '.join(SUBJECTS)}")
    return [
        ProfileCase(name, chosen, dtypes)
        for dtypes in options.dtypes
        for name in names
        for chosen in (options.options, *[everything(dtypes)] * options.everything)
    ]
