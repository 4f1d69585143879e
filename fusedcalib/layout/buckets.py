"""Slots -> launches: address tables and lists of tiles, as kernels/table.py reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .geometry import Geometry, geometry_of
from .recipe import Recipe
from .shards import Place, local_of

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


class TileShape(NamedTuple):
    """Tile of a slot [rows, columns] and the row class it puts the slot in."""

    rows: int
    columns: int
    row_class: object


class Executor(Protocol):
    """Runs buckets: Triton on a GPU, numba or plain torch."""

    name: str

    def shape(self, layout: Geometry, by_rows: bool, tensors: int, split: bool) -> TileShape:
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
    alignable: Array = field(default_factory=lambda: np.zeros(0, dtype=bool))  # of each slot, see Laid
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


class Laid(NamedTuple):
    """A slot as it is part of a launch.

    Attributes:
        key: what it has in common with the others; None where it has no element.
        row: of the table.
        tiles: of the list, those of slot 0.
        alignable: whether all its tensors but the gradient are aligned; it is aligned where that is, too.
    """

    slot: Slot
    key: Key | None
    row: Array
    tiles: Array
    alignable: bool

    @property
    def aligned(self) -> bool:
        """Whether all are."""
        return self.key is not None and self.key.aligned


def lay_slot(slot: Slot, totals: Tensor | None = None) -> Laid:
    """Lays a slot out. `totals`: of RowTotals, if its rows are split."""
    tensors = slot.tensors()
    param = tensors[0]
    if param.numel() == 0:
        return Laid(slot, None, np.empty(0), np.empty((0, 3)), False)
    columns = param.numel() // param.shape[0] if param.ndim else 1
    recipe = slot.compiled()
    by_rows = recipe.flags.by_rows or slot.factors is not None
    place = slot.place or Place(0, columns)
    # Rows whose elements are not numbered on from one to the next must be told apart.
    layout = geometry_of(tensors, by_rows or (recipe.flags.random and place.pitch != columns))
    shape = slot.executor.shape(layout, by_rows, len(tensors), totals is not None)
    alignable = is_aligned(tensors, layout, (param, *tensors[2:]))
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
        totals is not None,
        slot.factors is not None,
    )
    return Laid(
        slot, key, _row(slot, tensors, layout, shape, place, totals), _tiles(layout, shape), alignable
    )


def build_buckets(
    slots: Sequence[Slot],
    shared: Scalars,
    capturable: bool = False,
    totals: Mapping[int, Tensor] = MappingProxyType({}),
    lay: Callable[[Slot, Tensor | None], Laid] = lay_slot,
) -> list[Bucket]:
    """Sorts slots into launches and lays each launch out. `totals`: of RowTotals."""
    members: dict[Key, list[tuple[int, Laid]]] = {}
    alike: dict[int, list[tuple[int, Laid]]] = {}  # by the identity of a key: comparing them takes long
    for index, slot in enumerate(slots):
        laid = lay(slot, totals.get(index))
        if laid.key is not None:
            if id(laid.key) not in alike:
                alike[id(laid.key)] = members.setdefault(laid.key, [])
            alike[id(laid.key)].append((index, laid))
    return [_bucket(key, found, shared, capturable, totals) for key, found in members.items()]


def _bucket(
    key: Key,
    members: list[tuple[int, Laid]],
    shared: Scalars,
    capturable: bool,
    totals: Mapping[int, Tensor],
) -> Bucket:
    indices = np.array([index for index, _ in members])
    table = np.array([laid.row for _, laid in members])
    grads: list[Any] = [laid.slot.param.grad for _, laid in members]
    table[:, 1] = list(map(Tensor.data_ptr, map(local_of, grads)))
    tiles = np.concatenate([laid.tiles for _, laid in members])
    tiles[:, 0] = np.repeat(np.arange(len(members)), [len(laid.tiles) for _, laid in members])
    return Bucket(
        key,
        [laid.slot for _, laid in members],
        indices,
        table,
        tiles,
        shared,
        capturable,
        [totals.get(index) for index, _ in members],
        alignable=np.array([laid.alignable for _, laid in members], dtype=bool),
    )


def is_aligned(tensors: Sequence[Tensor], layout: Geometry, some: Sequence[Tensor] | None = None) -> bool:
    """Whether 16-byte accesses reach every element of every row of a slot's tensors, or of some of them."""
    vector = 16 // min(t.element_size() for t in tensors)
    whole = not layout.sizes and layout.columns % vector == 0
    return whole and all(t.data_ptr() % 16 == 0 for t in some or tensors)


def _in_quads(layout: Geometry, place: Place) -> bool:
    """Whether every row begins with a counter of its own: its elements are numbered from a multiple of 4."""
    return place.first % 4 == 0 and (layout.rows == 1 or (layout.columns % 4 == 0 and place.pitch % 4 == 0))


def _row(
    slot: Slot,
    tensors: Sequence[Tensor],
    layout: Geometry,
    shape: TileShape,
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


def _tiles(layout: Geometry, shape: TileShape) -> Array:
    """The tiles of one slot, int32 [n, 3]: slot 0, row block, column block; a row's pieces side by side."""
    row_blocks = -(-layout.rows // shape.rows)
    column_blocks = -(-layout.columns // shape.columns)
    tiles = np.empty((row_blocks * column_blocks, 3), dtype=np.int32)
    tiles[:, 0] = 0
    tiles[:, 1] = np.repeat(np.arange(row_blocks, dtype=np.int32), column_blocks)
    tiles[:, 2] = np.tile(np.arange(column_blocks, dtype=np.int32), row_blocks)
    return tiles
