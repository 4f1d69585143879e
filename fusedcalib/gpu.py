"""The Triton executor: keeps the tables on the device and calls the launches of `kernels/launch.py`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from .eager import squares
from .kernels import launch
from .kernels.step import step_kernel
from .kernels.table import GEOMETRY
from .layout import Layout
from .mirror import Mirror, capturing
from .tables import Bucket, Shape


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return type(step_kernel).__name__ == "InterpretedFunction"


def backend() -> str:
    """What Triton compiles for: "cuda", "hip" or "interpreter"."""
    return "interpreter" if interpreted() else "hip" if torch.version.hip else "cuda"


class TritonExecutor:
    """Runs a bucket in one launch, with one more for each sum over rows that no tile can hold."""

    name = "triton"

    def shape(self, layout: Layout, by_rows: bool, tensors: int, split: bool) -> Shape:
        """The tile of the slot's row class."""
        tile = launch.tile_for(layout.rows, layout.columns, by_rows, tensors, split)
        # A looping program walks its whole row: one tile a row in the list.
        columns = layout.columns if tile.reduction in launch.LOOPS else tile.columns
        return Shape(tile.rows, columns, tile)

    def run(self, bucket: Bucket, part: str = "step") -> int:
        """Steps every slot of the bucket on the current stream of its device."""
        resident = resident_of(bucket)
        table, tiles = resident.up_to_date(bucket)
        scalars = bucket.shared.on(bucket.key.device, bucket.compute)
        with guarded(bucket.key.device):
            parts = (part,) if bucket.key.split else launch.KERNELS
            return launch.launch_step(table, tiles, scalars, resident.sums, resident.spec, parts)

    def squares(self, bucket: Bucket) -> float:
        """Only asked where a step is decided on the host, which waits for it."""
        return squares(bucket)


def guarded(device: torch.device) -> AbstractContextManager[Any]:
    """The device's own guard: launches go to its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def resident_of(bucket: Bucket) -> Resident:
    """What of a bucket lies on its device."""
    if "resident" not in bucket.cache:
        bucket.cache["resident"] = Resident(bucket)
    return cast(Resident, bucket.cache["resident"])


class Resident:
    """Table and tiles of a bucket on its device, copied again only where they changed; scratch."""

    def __init__(self, bucket: Bucket) -> None:
        device = bucket.key.device
        self.spec = spec_of(bucket)
        self._tiles = Mirror(device, bucket.tiles)
        self._table = Mirror(device, bucket.table.copy())
        pieces = len(bucket.tiles) if self.spec.tile.reduction == "pieces" else 0
        self.sums = torch.empty(2 * pieces, dtype=bucket.compute, device=device)
        self._version = bucket.table_version

    def up_to_date(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """Table and tiles for this step."""
        if self._version != bucket.table_version:
            self._table.update(bucket.table)
            self._version = bucket.table_version
        if bucket.capturable and not capturing():
            self._table.prepare_capture()
        return self._table.tensor, self._tiles.tensor


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
        scalars=bucket.shared.values.shape[1],
        inner=key.inner,
        quads=key.quads,
        vector=vector if key.aligned else 1,
        tile=cast(launch.Tile, key.row_class),
        factored=key.factored,
    )


def fields_of(tensors: int, inner: int) -> int:
    """Columns of the table for a slot of this many tensors and inner dimensions."""
    return tensors + GEOMETRY + (inner + tensors * (1 + inner) if inner else 0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


EXECUTOR = TritonExecutor()
