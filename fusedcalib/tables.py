"""Slots -> launches: address tables and lists of tiles, as kernels/table.py reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .distributed import Place, local_of
from .layout import Layout, layout_of
from .recipe import Recipe

Array = np.ndarray[Any, np.dtype[Any]]


class Slot(NamedTuple):
    """One parameter to step, its local states. It does not hold the gradient: `zero_grad` must free it."""

    param: Tensor
    states: tuple[Tensor, ...]
    group: int
    recipe: Recipe
    executor: Executor
    words: tuple[int, int, int] = (0, 0, 0)  # stream and key of its noise
    place: Place | None = None  # where its local part lies, if it is spread over ranks
    factors: Tensor | None = None  # [rows], by which its gradient's rows are multiplied first

    def compiled(self) -> Recipe:
        """What is compiled of its recipe; the same on every rank."""
        shape = self.param.shape
        return self.recipe.for_tensor(len(shape), prod(shape[1:]))

    def tensors(self) -> tuple[Tensor, ...]:
        """Parameter, gradient, state...; complex ones as pairs of reals, as torch.optim's rules see them."""
        assert self.param.grad is not None
        param, grad = (local_of(t).detach() for t in (self.param, self.param.grad))
        tensors = (param, grad.resolve_conj().resolve_neg(), *self.states)  # copies only where it is lazy
        if self.param.is_complex():
            return tuple(torch.view_as_real(t) for t in tensors)
        return tensors


class Shape(NamedTuple):
    """Tile of a slot [rows, columns] and the row class it puts the slot in."""

    rows: int
    columns: int
    row_class: object


class Executor(Protocol):
    """Runs buckets: Triton on a GPU, numba or plain torch."""

    name: str

    def shape(self, layout: Layout, by_rows: bool, tensors: int, split: bool) -> Shape:
        """The tile for a slot of this layout and so many tensors; `split` if ranks share its rows."""

    def prepare(self, buckets: list[Bucket]) -> None:
        """Makes those of a plan ready to run: whatever can fail, as memory and compiling, is done here."""

    def run(self, bucket: Bucket, part: str = "step") -> int:
        """Steps every slot of the bucket; returns the number of kernel launches.

        Where rows lie on several ranks in three parts: "sums" leaves what of a row's mean is known here,
        "step" that of its norm, "finish" shortens it. What is left is added up in between.
        """

    def squares(self, bucket: Bucket) -> float:
        """Sum of the squares of all gradients of the bucket."""


class Key(NamedTuple):
    """What one launch has in common."""

    executor: Executor
    device: torch.device
    recipe: Recipe
    dtypes: tuple[torch.dtype, ...]
    inner: int
    quads: bool
    aligned: bool
    row_class: object
    mesh: object  # the ranks that share its parameters, if they are spread
    copies: int  # how many of them have the same part
    split: bool  # its rows lie on several ranks
    factored: bool  # its rows have factors


GEOMETRY = 12  # columns of the table between addresses and strides: see kernels/table.py
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class Scalars:
    """The rows of scalars of a step in double, and as buckets read them: in their type."""

    def __init__(self) -> None:
        self.rows: Sequence[Sequence[float]] = [()]
        self.resident: dict[torch.dtype, Tensor] = {}  # made on the device, where the step is decided there
        self._casts: dict[torch.dtype, Array] = {}

    def set(self, values: Sequence[Sequence[float]]) -> None:
        """Takes over the scalars of a step, a row each."""
        self.rows = values
        self._casts.clear()

    @property
    def count(self) -> int:
        """Scalars in a row."""
        return len(self.rows[0])

    def of(self, compute: torch.dtype) -> Array:
        """Rows in the type of the arithmetic."""
        if compute not in self._casts:
            self._casts[compute] = np.array(self.rows, dtype=_NUMPY[compute])
        return self._casts[compute]


@dataclass(eq=False)
class Bucket:
    """The slots of one launch, as tables."""

    key: Key
    slots: list[Slot]
    indices: Array  # of its slots in the plan
    table: Array  # int64 [slots, fields]
    tiles: Array  # int32 [programs, 3]
    shared: Scalars = field(default_factory=Scalars)  # one for all buckets of a plan
    capturable: bool = False
    totals: list[Tensor | None] = field(default_factory=list)  # of the rows of each slot, if it is split
    table_version: int = 0  # counts changes but those of gradients, for executors that keep a copy
    moves: int = 0  # counts changes of gradients
    cache: dict[Any, Any] = field(default_factory=dict)  # the executor's own: kernels, device copies
    # Of each slot, whether all its tensors but the gradient are aligned; while that is not, neither is the slot.
    alignable: Array = field(default_factory=lambda: np.zeros(0, dtype=bool))
    _only: tuple[int, int | None] | None = None

    @property
    def compute(self) -> torch.dtype:
        """Arithmetic is in fp32, in fp64 for fp64 parameters."""
        return torch.float64 if self.key.dtypes[0] == torch.float64 else torch.float32

    @property
    def scalar_rows(self) -> Array:
        """View of the table: the row of scalars of each slot."""
        return self.table[:, len(self.key.dtypes) + 2]

    @property
    def scalars(self) -> Array:
        """The rows of scalars, in the type of the arithmetic."""
        return self.shared.of(self.compute)

    def set_rows(self, rows: Array) -> None:
        """Takes over which row of scalars each slot of the plan uses."""
        mine = rows[self.indices]
        if not np.array_equal(mine, self.scalar_rows):
            self.scalar_rows[:] = mine
            self.table_version += 1

    def only_row(self) -> int | None:
        """The row of scalars that all its slots use, if it is one."""
        if self._only is None or self._only[0] != self.table_version:
            rows = self.scalar_rows
            self._only = self.table_version, int(rows[0]) if (rows == rows[0]).all() else None
        return self._only[1]

    @property
    def gradients(self) -> Array:
        """View of the table: the addresses of the gradients."""
        return self.table[:, 1]

    def set_gradients(self, addresses: Array) -> None:
        """Takes over the addresses of the gradients of the plan."""
        self.gradients[:] = addresses[self.indices]
        self.moves += 1


def prepare(buckets: Sequence[Bucket]) -> None:
    """Makes all ready to run, so that nothing fails once the first is launched."""
    executors = dict.fromkeys(bucket.key.executor for bucket in buckets)
    for executor in executors:
        executor.prepare([bucket for bucket in buckets if bucket.key.executor is executor])


def build_buckets(
    slots: Sequence[Slot],
    shared: Scalars,
    capturable: bool = False,
    totals: Mapping[int, Tensor] = MappingProxyType({}),
) -> list[Bucket]:
    """Sorts slots into launches and lays each launch out. `totals`: of RowTotals."""
    members: dict[Key, list[_Member]] = {}
    for index, slot in enumerate(slots):
        tensors = slot.tensors()
        param = tensors[0]
        if param.numel() == 0:
            continue
        columns = param.numel() // param.shape[0] if param.ndim else 1
        recipe, split = slot.compiled(), totals.get(index)
        by_rows = recipe.flags.by_rows or slot.factors is not None
        place = slot.place or Place(0, columns)
        # Rows whose elements are not numbered on from one to the next must be told apart.
        layout = layout_of(tensors, by_rows or (recipe.flags.random and place.pitch != columns))
        shape = slot.executor.shape(layout, by_rows, len(tensors), split is not None)
        alignable = is_aligned((param, *tensors[2:]), tensors, layout)
        key = Key(
            slot.executor,
            param.device,
            recipe,
            tuple(t.dtype for t in tensors),
            len(layout.sizes),
            recipe.flags.random and _in_quads(layout, place),
            alignable and tensors[1].data_ptr() % 16 == 0,
            shape.row_class,
            place.mesh,
            place.copies,
            split is not None,
            slot.factors is not None,
        )
        rows = members.setdefault(key, [])
        row = _row(slot, tensors, layout, shape, place, split)
        rows.append(_Member(index, row, _tiles(len(rows), layout, shape), alignable))
    return [
        Bucket(
            key,
            [slots[member.index] for member in rows],
            np.array([member.index for member in rows]),
            np.stack([member.row for member in rows]),
            np.concatenate([member.tiles for member in rows]),
            shared,
            capturable,
            [totals.get(member.index) for member in rows],
            alignable=np.array([member.alignable for member in rows], dtype=bool),
        )
        for key, rows in members.items()
    ]


class _Member(NamedTuple):
    """A slot of a launch: its number in the plan, row of the table, tiles."""

    index: int
    row: Array
    tiles: Array
    alignable: bool


def is_aligned(these: Sequence[Tensor], tensors: Sequence[Tensor], layout: Layout) -> bool:
    """Whether 16-byte accesses reach every element of every row of some of a slot's tensors."""
    vector = 16 // min(t.element_size() for t in tensors)
    return not layout.sizes and layout.columns % vector == 0 and all(t.data_ptr() % 16 == 0 for t in these)


def _in_quads(layout: Layout, place: Place) -> bool:
    """Whether every row begins with a counter of its own: its elements are numbered from a multiple of 4."""
    return place.first % 4 == 0 and (layout.rows == 1 or (layout.columns % 4 == 0 and place.pitch % 4 == 0))


def _row(
    slot: Slot,
    tensors: Sequence[Tensor],
    layout: Layout,
    shape: Shape,
    place: Place,
    totals: Tensor | None,
) -> Array:
    """The slot's row of the table, see kernels/table.py."""
    random = (*slot.words, place.first, place.pitch)
    of_rows = (0 if t is None else t.data_ptr() for t in (totals, slot.factors))
    geometry = (layout.rows, layout.columns, 0, shape.rows, shape.columns, *random, *of_rows)
    strides = (stride for strides in layout.strides for stride in strides)
    addresses = (t.data_ptr() for t in tensors)
    return np.array([*addresses, *geometry, *layout.sizes, *strides], dtype=np.int64)


def _tiles(slot: int, layout: Layout, shape: Shape) -> Array:
    """The tiles of one slot, int32 [n, 3]: slot, row block, column block; a row's pieces side by side."""
    row_blocks = -(-layout.rows // shape.rows)
    column_blocks = -(-layout.columns // shape.columns)
    tiles = np.empty((row_blocks * column_blocks, 3), dtype=np.int32)
    tiles[:, 0] = slot
    tiles[:, 1] = np.repeat(np.arange(row_blocks, dtype=np.int32), column_blocks)
    tiles[:, 2] = np.tile(np.arange(column_blocks, dtype=np.int32), row_blocks)
    return tiles
