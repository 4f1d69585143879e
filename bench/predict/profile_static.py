"""The kernels of a step compiled for a GPU that need not be there, and what they would take of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import starmap
from multiprocessing import get_context
from typing import Any

from ..models.architectures import Model
from ..models.traffic import Traffic
from ..report.tables import Columns
from . import compiled, static_costs
from .gpus import GPUS, Gpu
from .profile_steps import ProfileCase, Variant, tile_text, traffic_of, variants

Results = dict[str, Any]
WORKERS = 2


FEW = 3  # cases, which this process compiles itself


def profile(cases: Sequence[ProfileCase], model: Model, gpu_name: str, workers: int = WORKERS) -> Results:
    """The static profile of steps on a model: numbers in bytes, seconds and instructions of a lane.

    Raises:
        ValueError: an optimizer does not take the options of its case.
    """
    import triton

    tasks = [(case, model, gpu_name) for case in cases]
    if len(cases) <= FEW or workers < 2 or (os.cpu_count() or 1) < 2:
        profiles = list(starmap(profile_case, tasks))
    else:  # another process each: the compiler holds the interpreter
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            profiles = list(pool.map(profile_case, *zip(*tasks, strict=True)))
    return {
        "schema": 1,
        "model": model.name,
        "params": model.count,
        "tensors": len(model.params),
        "gpu": GPUS[gpu_name]._asdict(),
        "triton": triton.__version__,
        "cases": profiles,
    }


def profile_case(case: ProfileCase, model: Model, gpu_name: str) -> Results:
    """One step: its kernels, and its totals."""
    device = GPUS[gpu_name]
    kernels = [measured(variant, device) for variant in variants(case, model)]
    seconds = {
        name: sum(kernel["seconds"][name] for kernel in kernels) for name in ("memory", "issue", "bound")
    }
    moved = sum(kernel["moved"] for kernel in kernels)
    return {
        "optimizer": case.optimizer,
        "options": list(case.options),
        "dtypes": case.dtypes,
        "kernels": kernels,
        "launches": len(kernels),
        "moved": moved,
        "moved_per_param": moved / model.count,
        "seconds": seconds,
    }


def measured(variant: Variant, device: Gpu) -> Results:
    """What one kernel takes."""
    built = built_for(variant, device.target)
    used = compiled.usage(built)
    spec = variant.spec
    moves, per_element, warps = traffic_of(variant), 0.0, 4
    if spec is not None:
        counted = built
        if variant.kernel == "norm":  # the last program alone decides
            counted = compiled.compiled_norm(spec, None, device.target)
        per_element = len(compiled.instructions(counted)) / counted.elements
        warps = built.built.warps
    room = static_costs.occupancy(device.target, used.registers, warps, built.shared)
    moved = moves.memory * variant.elements
    time = static_costs.bound(device, moved, per_element * variant.lanes)
    needed = zip(("ld", "st"), moves.accessed, strict=True)
    widths = [width for kind, of_element in needed for width in built.widths(kind, of_element)]
    return {
        "kernel": variant.kernel,
        "tile": tile_text(variant),
        "tensors": variant.tensors,
        "elements": variant.elements,
        "lanes": variant.lanes,  # those of tiles that no tensor fills among them
        "registers": used.registers,
        "spilled": used.stack,
        "shared": built.shared,
        "occupancy": {"warps": room.warps, "most": room.most, "limit": room.limit},
        "in_flight": _in_flight(built, moves, room.warps),
        "widest": max(widths, default=None),
        "narrowest": min(widths, default=None),
        "bytes": moves.memory,
        "instructions": round(per_element, 2),
        "moved": moved,
        "seconds": {"memory": time.memory, "issue": time.issue, "bound": time.seconds},
        "bound": time.by,
    }


def _in_flight(built: compiled.Compiled, moves: Traffic, warps: int) -> int:
    """Bytes that the warps of a processor ask for at once, where each asks for all of its tile."""
    if built.tile is None:
        return 0
    return moves.read * built.elements * warps * static_costs.PROCESSORS[built.target].lanes


def built_for(variant: Variant, target: str) -> compiled.Compiled:
    """One kernel for a target."""
    if variant.spec is None:
        return compiled.compiled_control(variant.decider, target)
    if variant.kernel == "norm":
        return compiled.compiled_norm(variant.spec, variant.decider, target)
    return compiled.compiled_for(variant.spec, target, variant.kernel, variant.as_arguments)


def title(results: Results) -> str:
    """Model, GPU and compiler."""
    gpu = results["gpu"]
    return (
        f"{results['model']}: {results['params'] / 1e6:,.1f}M parameters in {results['tensors']} tensors, "
        f"{gpu['name']} ({gpu['target']}) at {gpu['bandwidth'] / 1e12:.3g} TB/s, Triton {results['triton']}"
    )


# What tables of kernels begin with.
COLUMNS: Columns[Results] = {
    "kernel": lambda kernel: kernel["kernel"],
    "tile": lambda kernel: kernel["tile"],
    "tensors": lambda kernel: str(kernel["tensors"]),
    "elements": lambda kernel: f"{kernel['elements'] / 1e6:,.3g}M",
}
