"""Slots laid out: their rows of the table, their tiles, and which of them share a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.storage import BLOCK
from .buckets import Array, Bucket, Key, Slot, TileShape
from .geometry import Geometry, geometry_of
from .scalars import Scalars
from .shards import Place, local_of

# Where every byte has an address of its own, which takes registers too, a thread has fewer elements.
UNALIGNED_BYTES = 8


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
    # So must rows whose blocks are not those of the whole.
    told_apart = (recipe.flags.random and place.pitch != columns) or (slot.scales and columns % BLOCK != 0)
    layout = geometry_of(tensors, by_rows or (bool(told_apart) and param.ndim > 1))
    held = ceil(sum(1 if t.element_size() > 1 else 0.25 for t in tensors))
    if slot.scales and layout.columns % vector_of([t.dtype for t in tensors]):
        held = UNALIGNED_BYTES
    whole = {"whole": True} if recipe.flags.row_state else {}
    shape = slot.executor.shape(layout, by_rows, held, totals is not None, **whole)
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
    norms: Mapping[int, Tensor] = MappingProxyType({}),
    statistics: Mapping[int, Tensor] = MappingProxyType({}),
) -> list[Bucket]:
    """Sorts slots into launches, laid out each.

    `totals`: of RowTotals, `norms`: of TensorTotals, `statistics`: of Statistics.
    """
    members: dict[Key, list[tuple[int, Laid]]] = {}
    alike: dict[int, list[tuple[int, Laid]]] = {}  # by the identity of a key: comparing them takes long
    for index, slot in enumerate(slots):
        laid = lay(slot, totals.get(index))
        if laid.key is not None:
            if id(laid.key) not in alike:
                alike[id(laid.key)] = members.setdefault(laid.key, [])
            alike[id(laid.key)].append((index, laid))
    buckets = [_bucket(key, found, shared, capturable, totals) for key, found in members.items()]
    for bucket in buckets:
        bucket.statistics = [statistics[index] for index in bucket.indices if index in statistics]
        bucket.norms = [norms[index] for index in bucket.indices if index in norms]
        if bucket.norms:
            bucket.table[:, -1 - len(bucket.slots[0].scales)] = [sums.data_ptr() for sums in bucket.norms]
    return buckets


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
    vector = vector_of([t.dtype for t in tensors])
    whole = not layout.sizes and layout.columns % vector == 0
    return whole and all(t.data_ptr() % 16 == 0 for t in some or tensors)


def vector_of(dtypes: Iterable[torch.dtype]) -> int:
    """Elements of an aligned slot that a thread takes at once: 16 bytes of the narrowest, 8 of bytes."""
    return 16 // max(2, min(dtype.itemsize for dtype in dtypes))


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
    of_row = slot.factors if slot.row_state is None else slot.row_state
    of_rows = (0 if t is None else t.data_ptr() for t in (totals, of_row))
    geometry = (layout.rows, layout.columns, 0, shape.rows, shape.columns, *random, *of_rows)
    strides = (stride for strides in layout.strides for stride in strides)
    addresses = (t.data_ptr() for t in tensors)
    scales = (t.data_ptr() for t in slot.scales)
    norms = [0] * (slot.recipe.flags.trust != "none")  # see TensorTotals
    return np.array([*addresses, *geometry, *layout.sizes, *strides, *norms, *scales], dtype=np.int64)


def _tiles(layout: Geometry, shape: TileShape) -> Array:
    """The tiles of one slot, int32 [n, 3]: slot 0, row block, column block; a row's pieces side by side."""
    row_blocks = -(-layout.rows // shape.rows)
    column_blocks = -(-layout.columns // shape.columns)
    tiles = np.empty((row_blocks * column_blocks, 3), dtype=np.int32)
    tiles[:, 0] = 0
    tiles[:, 1] = np.repeat(np.arange(row_blocks, dtype=np.int32), column_blocks)
    tiles[:, 2] = np.tile(np.arange(column_blocks, dtype=np.int32), row_blocks)
    return tiles
