"""Every kernel of a step on a model, compiled for a GPU that need not be there, and what it would take of it.

The engine itself lays the step out, on parameters without memory: what is compiled here is what it compiles.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import starmap
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np

import fusedcalib
from fusedcalib.executors.triton import run as gpu
from fusedcalib.kernels import launch
from fusedcalib.layout.buckets import Bucket
from fusedcalib.layout.scalars import Scalars, scalars_of, shape_of, tape_of
from fusedcalib.layout.tables import build_buckets

from ..measure.case import DTYPES
from ..measure.method import SUBJECTS
from ..models import shardings
from ..models.architectures import Model
from ..models.traffic import Traffic, traffic
from ..report.tables import Columns
from . import compiled, static_costs
from .gpus import GPUS, Gpu
from .plan_steps import parts_of

Results = dict[str, Any]
ALONE = shardings.Sharding(1, 1, 1)
WORKERS = 2
FEW = 3  # cases, which this process compiles itself

# What can be switched on around a rule, as an optimizer takes it.
OPTIONS: dict[str, dict[str, Any]] = {
    "l1": {"l1": 1e-3},
    "centralize": {"centralize": True},
    "centralize_update": {"centralize": "update"},
    "max_row_norm": {"max_row_norm": 1.0},
    "noise": {"noise": fusedcalib.GradientNoise(0.01)},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "skip_nonfinite": {"skip_nonfinite": True},
    "ema": {"ema_decay": 0.999},
    "stochastic_rounding": {"stochastic_rounding": True},
    "capturable": {"capturable": True},
}


def everything(dtypes: str) -> tuple[str, ...]:
    """Of OPTIONS, all that can be on together and do something to parameters in this storage."""
    never = ("centralize_update", "capturable", *["stochastic_rounding"] * (dtypes == "fp32"))
    return tuple(name for name in OPTIONS if name not in never)


@dataclass(frozen=True)
class ProfileCase:
    """What is compiled: an optimizer of SUBJECTS with these of OPTIONS, in storage of DTYPES."""

    optimizer: str = "AdamW"
    options: tuple[str, ...] = ()
    dtypes: str = "fp32"

    @property
    def title(self) -> str:
        options = ("everything",) if self.options == everything(self.dtypes) else self.options
        return ", ".join((self.optimizer, self.dtypes, *options))

    def chosen(self) -> dict[str, Any]:
        """Options for the optimizer."""
        found = dict(SUBJECTS[self.optimizer].options)
        for name in self.options:
            found |= OPTIONS[name]
        return found


NOTHING = launch.Decision((), (), 0, False)


class Variant(NamedTuple):
    """One kernel of a step; a launch each.

    Attributes:
        kernel: of launch.KERNELS, "norm" or "control".
        spec: what is compiled of the bucket; None for control.
        tensors, elements: of the model that it serves.
        lanes: elements of all its tiles, those that no tensor has among them.
        as_arguments: whether its scalars are arguments of the launch, in place of a table.
    """

    kernel: str
    spec: launch.Spec | None
    decision: launch.Decision
    tensors: int = 0
    elements: int = 0
    lanes: int = 0
    as_arguments: bool = False


def variants(case: ProfileCase, model: Model) -> list[Variant]:
    """All kernels of a step, in the order of their launches.

    Raises:
        ValueError: the optimizer does not take these options.
    """
    found = shardings.shards(model, ALONE)
    laid = parts_of(SUBJECTS[case.optimizer].cls, case.chosen(), DTYPES[case.dtypes], found, ALONE)
    scalars = Scalars()
    slots = [part.slot for part in laid.parts]
    recipes = {slot.group: slot.recipe for slot in slots}
    scalars.set([scalars_of(recipes[index], group, 1.0) for index, group in enumerate(laid.groups)])
    tape = tape_of(slots[0].recipe.rule, shape_of(laid.groups[0]))
    check = any(group["skip_nonfinite"] for group in laid.groups)
    decision = launch.Decision(tape.code, tape.outputs, len(tape.leaves), check)
    alike = [part.alike for part in laid.parts]
    buckets = build_buckets(slots, scalars)
    for bucket in buckets:
        bucket.set_rows(np.array([slot.group for slot in slots]))
    return launches(buckets, alike, laid.measures, laid.decides, decision)


def launches(
    buckets: Sequence[Bucket],
    alike: Sequence[int],
    measures: bool,
    decides: bool,
    decision: launch.Decision = NOTHING,
) -> list[Variant]:
    """The kernels that step these buckets, in order; `alike`: how many there are of each slot of the plan."""
    before: list[Variant] = []
    steps: list[Variant] = []
    for bucket in buckets:
        spec = gpu.spec_of(bucket)
        counts = np.array([alike[i] for i in bucket.indices])
        sizes = np.array([slot.tensors()[0].numel() for slot in bucket.slots])
        served = int(counts.sum()), int(counts @ sizes)
        if measures:
            tile = _norm_tile(spec)
            lanes = int(counts @ _lanes(bucket, tile))
            before.insert(0, Variant("norm", spec, decision, *served, lanes))  # the last bucket comes first
        as_arguments = not decides and gpu.arguments_of(bucket) is not None
        for kernel in launch.parts_of(spec.tile, spec.flags):
            lanes = int(counts @ _lanes(bucket, spec.built))
            steps.append(Variant(kernel, spec, decision, *served, lanes, as_arguments))
    if decides and not measures:
        before.append(Variant("control", None, decision))
    return [*before, *steps]


def _norm_tile(spec: launch.Spec) -> launch.Tile:
    constants = launch.norm_constants(spec)
    return launch.Tile(*(constants[name] for name in ("R", "C", "num_warps", "REDUCTION")))


def _lanes(bucket: Bucket, tile: launch.Tile) -> Any:
    """Elements of all tiles that the programs walk in each slot."""
    first = len(bucket.key.dtypes)
    rows, columns = bucket.table[:, first], bucket.table[:, first + 1]
    return -(-rows // tile.rows) * -(-columns // tile.columns) * tile.rows * tile.columns


def traffic_of(variant: Variant) -> Traffic:
    """What a kernel moves of each element."""
    spec = variant.spec
    if spec is None:
        return Traffic(0, 0)
    sizes = [dtype.primitive_bitwidth // 8 for dtype in spec.dtypes]
    return traffic(variant.kernel, spec.flags, sizes, spec.built.reduction == "loop")


# -- compiled


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
            counted = compiled.compiled_norm(spec, NOTHING, device.target, decide=False)
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
        return compiled.compiled_control(variant.decision, target)
    if variant.kernel == "norm":
        return compiled.compiled_norm(variant.spec, variant.decision, target)
    return compiled.compiled_for(variant.spec, target, variant.kernel, variant.as_arguments)


def tile_text(variant: Variant) -> str:
    """The tile of a kernel in a few words, and what is special about it."""
    spec = variant.spec
    if spec is None:
        return "one program"
    tile = _norm_tile(spec) if variant.kernel == "norm" else spec.built
    words = [f"{tile.rows}x{tile.columns} {tile.warps}w"]
    if tile.reduction != "none":
        words.append(tile.reduction)
    if spec.vector == 1:
        words.append("strided" if spec.inner else "unaligned")
    return " ".join(words)


def title(results: Results) -> str:
    """Model, GPU and compiler."""
    gpu = results["gpu"]
    return (
        f"{results['model']}: {results['params'] / 1e6:,.1f}M parameters in {results['tensors']} tensors, "
        f"{gpu['name']} ({gpu['target']}) at {gpu['bandwidth'] / 1e12:.3g} TB/s, Triton {results['triton']}"
    )


def case_title(found: Results) -> str:
    """Optimizer, storage and options of a case."""
    return ProfileCase(found["optimizer"], tuple(found["options"]), found["dtypes"]).title


# What tables of kernels begin with.
COLUMNS: Columns[Results] = {
    "kernel": lambda kernel: kernel["kernel"],
    "tile": lambda kernel: kernel["tile"],
    "tensors": lambda kernel: str(kernel["tensors"]),
    "elements": lambda kernel: f"{kernel['elements'] / 1e6:,.3g}M",
}
