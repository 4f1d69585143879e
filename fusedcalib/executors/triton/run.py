"""The launches of buckets, and what of them lies on the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...kernels import launch
from ...kernels.observed import OBSERVED
from ...kernels.step import step_kernel
from ...kernels.storage import CODED
from ...kernels.table import GEOMETRY
from ...layout.buckets import Bucket
from ...layout.tables import vector_of
from .pinned import Users
from .resident import DeviceArray, Streams, capturing, sent


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return type(step_kernel).__name__ == "InterpretedFunction"


def backend() -> str:
    """What Triton compiles for: "cuda", "hip" or "interpreter"."""
    return "interpreter" if interpreted() else "hip" if torch.version.hip else "cuda"


def guarded(device: torch.device) -> AbstractContextManager[Any]:
    """The device's own guard, where it is not the current one: launches go to its current stream."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def resident_of(bucket: Bucket) -> Resident:
    """What of a bucket lies on its device."""
    if "resident" not in bucket.cache:
        bucket.cache["resident"] = Resident(bucket)
    return cast(Resident, bucket.cache["resident"])


class Together:
    """What the launches of a plan on one device share: addresses of gradients, scalars, streams.

    Gradients move from step to step: their addresses are one array, and one copy brings them.

    Attributes:
        gradients: int64 on the device, the addresses of all gradients for the coming step.
    """

    gradients: Tensor

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self._device = buckets[0].key.device
        self._residents = [resident_of(bucket) for bucket in buckets]
        # Each begins at a multiple of 16 bytes, or other kernels would be compiled for it.
        ends = np.cumsum([len(bucket.slots) + len(bucket.slots) % 2 for bucket in buckets])
        self._places = [
            slice(end - len(b.slots) - len(b.slots) % 2, end) for end, b in zip(ends, buckets, strict=True)
        ]
        self._gradients = DeviceArray(self._device, np.zeros(ends[-1], dtype=np.int64))
        self.gradients = self._gradients.tensor
        self._own = [self.gradients[place] for place in self._places]
        self._scalars: dict[torch.dtype, DeviceArray] = {}
        self._moves: list[int] = []
        self._captured = False  # whether launches read what a graph has of its own
        self._streams = Streams(self._device)
        slots = [slot for bucket in buckets for slot in bucket.slots]
        self._offloaded = Users(self._device, (t for slot in slots for t in slot.beside()))

    def prepare(self) -> None:
        """Makes launches ready that are to run next, on this device's current stream."""
        captured = capturing()
        moves = [bucket.moves for bucket in self._buckets]
        if moves != self._moves or captured or self._captured:
            self._send_gradients(captured)
            self._moves, self._captured = moves, captured
        if self._buckets[0].capturable and not captured:
            self._gradients.prepare_capture()
        for resident in self._residents:
            resident.up_to_date(self._scalars_of(resident.bucket))
        self._streams.note(self._tensors)
        self._offloaded.note()

    def first_of(self, bucket: Bucket) -> int:
        """Where the addresses of the gradients of a bucket begin among all."""
        first: int = self._places[self._buckets.index(bucket)].start
        return first

    def _send_gradients(self, captured: bool) -> None:
        addresses = np.zeros_like(self._gradients.host)
        for bucket, place in zip(self._buckets, self._places, strict=True):
            addresses[place][: len(bucket.slots)] = bucket.gradients
        if captured:
            self.gradients = self._gradients.captured(addresses)
            parts = [self.gradients[place] for place in self._places]
        else:
            self._gradients.update(addresses)
            self.gradients, parts = self._gradients.tensor, self._own
        for resident, part in zip(self._residents, parts, strict=True):
            resident.gradients = part

    def _scalars_of(self, bucket: Bucket) -> Tensor | tuple[float, ...]:
        """Those of a bucket: on the device; or numbers, which need no copy, where its slots have one row."""
        shared, compute = bucket.shared, bucket.compute
        if compute in shared.resident:  # the step is decided there
            return shared.resident[compute]
        if (numbers := arguments_of(bucket)) is not None:
            return numbers
        rows = shared.of(compute)
        mirror = self._scalars.get(compute)
        if mirror is None or mirror.host.shape != rows.shape:
            mirror = self._scalars[compute] = DeviceArray(self._device, rows)
            self._streams = Streams(self._device)  # it has to be told of this one too
        mirror.update(rows)
        return mirror.tensor

    def _tensors(self) -> list[Tensor]:
        mirrors = [self._gradients, *self._scalars.values()]
        return [t for r in self._residents for t in r.tensors()] + [mirror.tensor for mirror in mirrors]


class Resident:
    """Table and tiles of a bucket on its device; scratch; its launches.

    Attributes:
        gradients: int64 [slots and more], the addresses of the gradients for the coming step.
        launches: of the coming step, by their parts.
    """

    gradients: Tensor

    def __init__(self, bucket: Bucket) -> None:
        device = bucket.key.device
        self.bucket = bucket
        self.spec = spec_of(bucket)
        self.tiles = sent(device, bucket.tiles)
        self._table = DeviceArray(device, bucket.table)
        pieces = len(bucket.tiles) if self.spec.REDUCTION == "pieces" else 0
        self.sums = torch.empty(2 * pieces, dtype=bucket.compute, device=device)
        firsts = np.searchsorted(bucket.tiles[:, 0], np.arange(len(bucket.slots) + 1)).astype(np.int32)
        self._norms: tuple[Tensor, ...] = ()  # scratch of norms of whole tensors
        if bucket.norms:
            partials = torch.empty(len(bucket.tiles) * self.spec.SUMS, dtype=torch.float64, device=device)
            self._norms = partials, sent(device, firsts)
        self._observed: tuple[Tensor, ...] = ()  # scratch of statistics
        if bucket.statistics:  # zeros, for a first step that is left out leaves nothing
            partials = torch.zeros(len(bucket.tiles) * OBSERVED, dtype=torch.float64, device=device)
            places = np.array([t.data_ptr() for t in bucket.statistics])
            self._norms = self._norms or (self.sums, sent(device, firsts))
            self._observed = partials, sent(device, places)
        self.launches: dict[str, launch.Launch] = {}
        self._version = bucket.table_version
        self._read: tuple[Any, Any] = (None, None)  # gradients and scalars, as launches have them

    @property
    def table(self) -> Tensor:
        """int64 [slots, fields]."""
        return self._table.tensor

    def up_to_date(self, scalars: Tensor | tuple[float, ...]) -> None:
        """Makes the launches of this step ready."""
        if self._version != self.bucket.table_version:
            self._table.update(self.bucket.table)
            self._version = self.bucket.table_version
        gradients, before = self._read
        if type(scalars) is not type(before):
            spec = self.spec._replace(COUNT=0) if isinstance(scalars, tuple) else self.spec
            scratch = launch.Scratch(self.sums, *self._norms, *self._observed)
            self.launches = launch.step_launches(
                self.table, self.gradients, self.tiles, scalars, scratch, spec
            )
        elif gradients is not self.gradients or scalars is not before:
            for each in self.launches.values():
                each.set(launch.GRADS, self.gradients)
                each.set(launch.SCALARS, scalars)
        self._read = self.gradients, scalars
        for each in self.launches.values():
            each.prepare()

    def tensors(self) -> list[Tensor]:
        """What lies on the device."""
        return [self.table, self.tiles, self.sums, *self._norms, *self._observed]


def arguments_of(bucket: Bucket) -> tuple[float, ...] | None:
    """The scalars of a launch that takes them as arguments: in fp32, where all slots have the same row."""
    row = bucket.only_row() if bucket.compute == torch.float32 else None
    return None if row is None else tuple(bucket.shared.rows[row])


def spec_of(bucket: Bucket) -> launch.Spec:
    """What is compiled for a bucket."""
    key = bucket.key
    spec = launch.Spec(
        DTYPES=tuple(launch.dtype_of(_name(dtype)) for dtype in key.dtypes),
        COMPUTE=launch.dtype_of(_name(bucket.compute)),
        FIELDS=fields_of(len(key.dtypes), key.inner)
        + (key.recipe.flags.trust != "none")
        + sum(kind in CODED for kind in key.recipe.kept),
        COUNT=bucket.shared.count,
        D=key.inner,
        QUADS=key.quads,
        VECTOR=vector_of(key.dtypes) if key.aligned else 1,
        FACTORED=key.factored,
        KEPT=key.recipe.kept,
    )
    spec = spec.of_rule(key.recipe.rule.update, key.recipe.flags, key.recipe.rule.trust)
    return spec.tiled(cast(launch.Tile, key.row_class))


def fields_of(tensors: int, inner: int) -> int:
    """Columns of the table for a slot of this many tensors and inner dimensions, but for scales."""
    return tensors + GEOMETRY + (inner + tensors * (1 + inner) if inner else 0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
