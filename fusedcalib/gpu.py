"""The Triton executor: keeps the tables on the device and calls the launches of `kernels/launch.py`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

import numpy as np
import torch
from torch import Tensor

from .kernels import launch
from .kernels.step import step_kernel
from .kernels.table import GEOMETRY
from .layout import Layout
from .tables import Array, Bucket, Shape


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return type(step_kernel).__name__ == "InterpretedFunction"


class TritonExecutor:
    """Runs a bucket in one launch, with one more for each sum over rows that no tile can hold."""

    name = "triton"

    def shape(self, layout: Layout, by_rows: bool, tensors: int) -> Shape:
        """The tile of the slot's row class."""
        tile = launch.tile_for(layout.rows, layout.columns, by_rows, tensors)
        # A looping program walks its whole row: one tile a row in the list.
        columns = layout.columns if tile.reduction == "loop" else tile.columns
        return Shape(tile.rows, columns, tile)

    def run(self, bucket: Bucket) -> int:
        """Steps every slot of the bucket on the current stream of its device."""
        device = bucket.key.device
        resident = bucket.cache.get("resident")
        if resident is None:
            resident = bucket.cache["resident"] = _Resident(bucket)
        table, tiles, scalars, sums = resident.up_to_date(bucket)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return launch.launch_step(table, tiles, scalars, sums, resident.spec)


class _Resident:
    """What of a bucket lies on its device; copied again only where it changed."""

    def __init__(self, bucket: Bucket) -> None:
        device = bucket.key.device
        self.spec = spec_of(bucket)
        self._tiles = _on(device, bucket.tiles)
        pieces = len(bucket.tiles) if self.spec.tile.reduction == "pieces" else 0
        self._sums = torch.empty(2 * pieces, dtype=bucket.compute, device=device)
        self._versions = (-1, -1)

    def up_to_date(self, bucket: Bucket) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Table, tiles, scalars and scratch for this step."""
        table, scalars = self._versions
        if table != bucket.table_version:
            self._table = _on(bucket.key.device, bucket.table)
        if scalars != bucket.scalars_version:
            self._scalars = _on(bucket.key.device, bucket.scalars)
        self._versions = bucket.table_version, bucket.scalars_version
        return self._table, self._tiles, self._scalars, self._sums


def spec_of(bucket: Bucket) -> launch.Spec:
    """What is compiled for a bucket."""
    key = bucket.key
    vector = 16 // min(dtype.itemsize for dtype in key.dtypes)
    return launch.Spec(
        rule=key.recipe.rule.update,
        flags=key.recipe.flags,
        dtypes=tuple(launch.dtype_of(_name(dtype)) for dtype in key.dtypes),
        compute=launch.dtype_of(_name(bucket.compute)),
        fields=fields_of(len(key.dtypes), key.inner),
        scalars=bucket.scalars.shape[1],
        inner=key.inner,
        quads=key.quads,
        vector=vector if key.aligned else 1,
        tile=cast(launch.Tile, key.row_class),
    )


def fields_of(tensors: int, inner: int) -> int:
    """Columns of the table for a slot of this many tensors and inner dimensions."""
    return tensors + GEOMETRY + (inner + tensors * (1 + inner) if inner else 0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on(device: torch.device, values: Array) -> Tensor:
    """A copy on the device, queued behind the work of the current stream: the host does not wait."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)


EXECUTOR = TritonExecutor()
