"""Every kernel of a step on a model, compiled for a GPU that need not be there, and what it would take of it.

The engine itself lays the step out, on parameters without memory: what is compiled here is what it compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

import fusedcalib
from fusedcalib.executors.triton import run as gpu
from fusedcalib.executors.triton.measured import lists_of, measured_spec
from fusedcalib.kernels import launch
from fusedcalib.kernels.storage import CODED
from fusedcalib.layout.buckets import Bucket
from fusedcalib.layout.scalars import Scalars, scalars_of, shape_of, tape_of
from fusedcalib.layout.tables import build_buckets

from ..measure.method import SUBJECTS
from ..models import shardings
from ..models.architectures import Model
from ..models.traffic import DTYPES, Traffic, sizes_of, traffic
from ..report.tables import Columns
from .plan_steps import parts_of

ALONE = shardings.Sharding(1, 1, 1)

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
    """All of OPTIONS that can be on together and do something to parameters in this storage."""
    never = ("centralize_update", "capturable", *["stochastic_rounding"] * (not DTYPES[dtypes].rounds))
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


NOTHING = launch.DeciderSpec()


class Variant(NamedTuple):
    """One kernel of a step; a launch each."""

    kernel: str  # of launch.KERNELS, "norm" or "control"
    spec: launch.Spec | None  # what is compiled of the bucket; None for control
    decider: launch.DeciderSpec
    tensors: int = 0  # of the model that it serves
    elements: int = 0
    lanes: int = 0  # elements of all its tiles, those that no tensor has among them
    as_arguments: bool = False  # whether its scalars are arguments of the launch, in place of a table


def variants(case: ProfileCase, model: Model) -> list[Variant]:
    """All kernels of a step, in the order of their launches."""
    found = shardings.shards(model, ALONE)
    laid = parts_of(SUBJECTS[case.optimizer].cls, case.chosen(), DTYPES[case.dtypes], found, ALONE)
    scalars = Scalars()
    slots = [part.slot for part in laid.parts]
    recipes = {slot.group: slot.recipe for slot in slots}
    scalars.set([scalars_of(recipes[index], group, 1.0) for index, group in enumerate(laid.groups)])
    tape = tape_of(slots[0].recipe.rule, shape_of(laid.groups[0]))
    check = any(group["skip_nonfinite"] for group in laid.groups)
    decider = launch.DeciderSpec(tape.code, tape.outputs, len(tape.leaves), check)
    alike = [part.alike for part in laid.parts]
    buckets = build_buckets(slots, scalars)
    for bucket in buckets:
        bucket.set_rows(np.array([slot.group for slot in slots]))
    return launches(buckets, alike, laid.measures, laid.decides, decider)


def launches(
    buckets: Sequence[Bucket],
    alike: Sequence[int],
    measures: bool,
    decides: bool,
    decider: launch.DeciderSpec = NOTHING,
) -> list[Variant]:
    """The kernels that step these buckets, in order; `alike`: how many there are of each slot of the plan."""
    before: list[Variant] = []
    steps: list[Variant] = []
    for members in lists_of(buckets) if measures else ():
        spec = measured_spec(members)
        counted = [_served(bucket, alike, spec.measured().tile) for bucket in members]
        tensors, elements, lanes = (sum(one) for one in zip(*counted, strict=True))
        before.append(Variant("norm", spec, decider, tensors, elements, lanes))
    for bucket in buckets:
        spec = gpu.spec_of(bucket)
        as_arguments = not decides and gpu.arguments_of(bucket) is not None
        for kernel in launch.parts_of(spec.tile, bucket.key.recipe.flags):
            served = _served(bucket, alike, spec.tile)
            steps.append(Variant(kernel, spec, decider, *served, as_arguments))
    if decides and not measures:
        before.append(Variant("control", None, decider))
    return [*before, *steps]


def _served(bucket: Bucket, alike: Sequence[int], tile: launch.Tile) -> tuple[int, int, int]:
    """Tensors of the model that a launch over a bucket serves, their elements, and those of all its tiles."""
    counts = np.array([alike[i] for i in bucket.indices])
    sizes = np.array([slot.tensors()[0].numel() for slot in bucket.slots])
    first = len(bucket.key.dtypes)
    rows, columns = bucket.table[:, first], bucket.table[:, first + 1]
    lanes = -(-rows // tile.rows) * -(-columns // tile.columns) * tile.rows * tile.columns
    return int(counts.sum()), int(counts @ sizes), int(counts @ lanes)


def traffic_of(variant: Variant) -> Traffic:
    """What a kernel moves of each element."""
    spec = variant.spec
    if spec is None or spec.FLAGS is None:
        return Traffic(0, 0)
    sizes = sizes_of((dtype.primitive_bitwidth // 8 for dtype in spec.DTYPES), spec.KEPT)
    return traffic(variant.kernel, spec.FLAGS, sizes, spec.REDUCTION == "loop")


def tile_text(variant: Variant) -> str:
    """The tile of a kernel in a few words, and what is special about it."""
    spec = variant.spec
    if spec is None:
        return "one program"
    tile = (spec.measured() if variant.kernel == "norm" else spec).tile
    words = [f"{tile.rows}x{tile.columns} {tile.warps}w"]
    if {*spec.KEPT} & {*CODED}:
        words.append("8-bit")
    if tile.reduction != "none":
        words.append(tile.reduction)
    if spec.VECTOR == 1:
        words.append("strided" if spec.D else "unaligned")
    return " ".join(words)


# -- what is told of them


@dataclass
class Kernel:
    """One kernel of a step, and what it moves."""

    kernel: str
    tile: str
    tensors: int
    elements: int
    bytes: float  # of each element
    moved: int = field(init=False)

    def __post_init__(self) -> None:
        self.moved = round(self.bytes * self.elements)


def kernel_of(variant: Variant) -> tuple[str, str, int, int, float]:
    """What any profile tells of a kernel, as Kernel takes it."""
    width = traffic_of(variant).memory
    return variant.kernel, tile_text(variant), variant.tensors, variant.elements, width


@dataclass(kw_only=True)
class Profile:
    """What is told of the model of any profile."""

    model: str
    params: int
    tensors: int

    @property
    def about_model(self) -> str:
        return f"{self.model}: {self.params / 1e6:,.1f}M parameters in {self.tensors} tensors"


K = TypeVar("K", bound=Kernel)


def columns(more: Columns[K]) -> Columns[K]:
    """The columns of a table of kernels."""
    return {
        "kernel": lambda kernel: kernel.kernel,
        "tile": lambda kernel: kernel.tile,
        "tensors": lambda kernel: str(kernel.tensors),
        "elements": lambda kernel: f"{kernel.elements / 1e6:,.3g}M",
        **more,
    }
