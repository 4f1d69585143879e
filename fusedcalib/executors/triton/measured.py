"""Which lists of gradients a launch measures together, and what it reads of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ...kernels import launch
from ...kernels.table import GEOMETRY
from ...layout.buckets import Bucket
from .resident import Array, DeviceArray, sent
from .run import Together, resident_of, spec_of

OWN = 2  # tensors in a row of a table of joined lists: norm_kernel knows of parameters and gradients


class Measured:
    """The gradients of one launch of norm_kernel.

    Args:
        buckets: whose they are, one of the lists of `lists_of`.

    Attributes:
        key: of the first of them.
        spec: what norm_kernel is compiled for.
        tiles: how many there are.
        gradients: int64 on the device, the addresses for the coming step.
    """

    gradients: Tensor

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.key = buckets[0].key
        self.spec = measured_spec(buckets)
        self.tiles = sum(len(bucket.tiles) for bucket in buckets)
        self._buckets = buckets
        self._own: tuple[DeviceArray, Tensor] | None = None  # table and tiles, of joined lists
        self._versions: list[int] = []

    def up_to_date(self, together: Together) -> None:
        """Makes what is read ready for the coming step."""
        if len(self._buckets) == 1:
            self.gradients = resident_of(self._buckets[0]).gradients
            return
        self.gradients = together.gradients
        versions = [bucket.table_version for bucket in self._buckets]
        if self._own is None:
            table, tiles = self._table(together), self._tiles(together)
            self._own = DeviceArray(self.key.device, table), sent(self.key.device, tiles)
        elif versions != self._versions:
            self._own[0].update(self._table(together))
        self._versions = versions

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Table, addresses of gradients and tiles, as norm_kernel takes them."""
        if self._own is None:
            resident = resident_of(self._buckets[0])
            return resident.table, self.gradients, resident.tiles
        return self._own[0].tensor, self.gradients, self._own[1]

    def tensors(self) -> list[Tensor]:
        """What lies on the device for this alone."""
        return [] if self._own is None else [self._own[0].tensor, self._own[1]]

    def _table(self, together: Together) -> Array:
        """A row for each place among the addresses, as lists of tensors without states have it."""
        table = np.zeros((len(together.gradients), OWN + GEOMETRY), dtype=np.int64)
        for bucket in self._buckets:
            first, count = together.first_of(bucket), len(bucket.key.dtypes)
            columns = [*range(OWN), *range(count, count + GEOMETRY)]
            table[first : first + len(bucket.slots)] = bucket.table[:, columns]
        return table

    def _tiles(self, together: Together) -> Array:
        """Those of all lists, the first first."""
        firsts = [(together.first_of(bucket), 0, 0) for bucket in self._buckets]
        moved = [
            bucket.tiles + np.array(first, dtype=np.int32)
            for bucket, first in zip(self._buckets, firsts, strict=True)
        ]
        return np.concatenate(moved)


def lists_of(buckets: Sequence[Bucket]) -> list[list[Bucket]]:
    """Buckets by the launch that measures them: the list that the step begins with is the last.

    Each has its own. Where states or parameters are kept otherwise than by a cast, small parameters and
    vectors have another form than matrices. The norm, which reads gradients alone, need not know of it: lists
    whose gradients have one dtype and tile share a launch.
    """
    alike: dict[object, list[Bucket]] = {}
    for bucket in buckets:
        alike.setdefault(_norm_of(bucket), []).append(bucket)
    found: list[list[Bucket]] = []
    for members in alike.values():
        together = any(bucket.key.recipe.kept for bucket in members)
        found += [members] if together else [[bucket] for bucket in members]
    order = {id(bucket): i for i, bucket in enumerate(buckets)}
    return sorted(found, key=lambda members: order[id(members[0])], reverse=True)


def _norm_of(bucket: Bucket) -> object:
    """What lists have in common that one launch can measure."""
    spec = spec_of(bucket).measured()
    if spec.D or spec.FACTORED:  # of strides and factors a table has more than of other slots
        return id(bucket)
    aligned = spec.VECTOR > 1
    return spec.DTYPES[:OWN], spec.tile, aligned, bucket.key.mesh, bucket.key.copies


def measured_spec(buckets: Sequence[Bucket]) -> launch.Spec:
    """What norm_kernel is compiled for, of one of the lists of `lists_of`."""
    specs = [spec_of(bucket) for bucket in buckets]
    if len(specs) == 1:
        return specs[0]
    vector, first = min(spec.VECTOR for spec in specs), specs[0]
    return first._replace(DTYPES=first.DTYPES[:OWN], FIELDS=OWN + GEOMETRY, KEPT=(), VECTOR=vector)
