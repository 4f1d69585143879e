"""What a step launches, moves and sends on the GPU that has most to do.

Ours is laid out by the engine itself, on parameters without memory: its launches are counted, not modelled.
What users compose around torch.optim is counted by the arrays that each operation reads and writes.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch

import fusedcalib
from fusedcalib.engine.state import make_state, scales_of, states_of
from fusedcalib.executors.triton.executor import EXECUTOR
from fusedcalib.executors.triton.measured import lists_of
from fusedcalib.kernels import launch
from fusedcalib.kernels.storage import BLOCK, CODED
from fusedcalib.layout.buckets import Slot
from fusedcalib.layout.recipe import Recipe, merged, needs_of, recipe_of
from fusedcalib.layout.scalars import Scalars
from fusedcalib.layout.shards import Place
from fusedcalib.layout.split_rows import RowTotals
from fusedcalib.layout.storage import in_bytes
from fusedcalib.layout.tables import build_buckets

from ..measure.baselines import METHODS, options_of
from ..measure.method import Method, NotAvailableError, Subject
from ..models.shardings import Mesh, Shard, Sharding
from ..models.traffic import AROUND, DTYPES, FOREACH_ADAMW, FP32, Pass, Storage, sizes_of, traffic

ROWS = (
    *("torch_foreach", "torch_fused", "own_plain", "eager_gc_fused", "own_gc"),
    *("eager_clip", "own_clip", "eager_chain", "own_chain"),
)
KINDS: dict[str, dict[str, Any]] = {  # of shardings.kind_of, as fusedcalib.param_groups has them
    "weight": {},
    "embedding": {"centralize": False},
    "vector": {"weight_decay": 0.0, "centralize": False},
}
SQUARES = 8  # bytes of the sum of all squares, in fp64


@dataclass(frozen=True)
class Collective:
    """One all-reduce: the dimension of the mesh that it goes over, and its bytes."""

    over: str
    bytes: int


@dataclass(frozen=True)
class Step:
    """A step on one GPU; `moved` are bytes that its memory reads and writes, `kept` those that stay there.

    Of them are those of states, and of what is beside parameters, which `offload` has in the host's memory.
    """

    name: str
    title: str
    moved: int
    kept: int
    launches: int
    collectives: tuple[Collective, ...]
    states_read: int = field(default=0, kw_only=True)
    states_written: int = field(default=0, kw_only=True)
    states_kept: int = field(default=0, kw_only=True)

    @property
    def own(self) -> bool:
        return self.name.startswith("own")


def step_of(name: str, subject: Subject, dtypes: str, found: Counter[Shard], sharding: Sharding) -> Step:
    """The step of one of baselines.METHODS, for what shardings.shards has found.

    Raises:
        NotAvailableError: torch.optim has no such step.
    """
    count = own if name.startswith("own") else composed
    return count(METHODS[name], subject, dtypes, found, sharding)


# -- ours


class Part(NamedTuple):
    """A slot, and how many there are of its like."""

    slot: Slot
    alike: int

    @property
    def size(self) -> int:
        """Elements of all that are alike."""
        return self.alike * self.slot.tensors()[0].numel()

    def kept(self, first: int = 0) -> int:
        """Bytes of all that are alike, from a tensor of the slot on: 0 the parameter, 2 the first state."""
        tensors = (*self.slot.tensors()[first:], *self.slot.scales)
        return self.alike * sum(t.numel() * t.element_size() for t in tensors)

    @property
    def sizes(self) -> list[float]:
        """Bytes of an element of each tensor, with its share in the scales that are laid out."""
        tensors, scales = self.slot.tensors(), self.slot.scales
        share = FP32 * scales[0].numel() / max(1, tensors[0].numel()) if scales else 0.0
        return sizes_of((t.element_size() for t in tensors), self.slot.compiled().kept, share)


def own(method: Method, subject: Subject, dtypes: str, found: Counter[Shard], sharding: Sharding) -> Step:
    """Our step, as the engine lays it out."""
    options = {**subject.options, **options_of(method.extras)}
    laid = parts_of(subject.cls, options, DTYPES[dtypes], found, sharding)
    parts, slots = laid.parts, [part.slot for part in laid.parts]
    totals = RowTotals(slots)
    buckets = build_buckets(slots, Scalars(), totals=totals.parts)
    moved = launches = read = written = 0
    for bucket in buckets:
        flags = bucket.key.recipe.flags
        kernels = launch.parts_of(cast(launch.Tile, bucket.key.row_class), flags)
        launches += len(kernels)
        for part in (parts[i] for i in bucket.indices):
            names = (*kernels, *["norm"] * laid.measures)
            moved += round(sum(traffic(name, flags, part.sizes).memory for name in names) * part.size)
            of_states = [traffic(name, flags, [0, 0, *part.sizes[2:]]) for name in names]
            read += round(sum(one.read for one in of_states) * part.size)
            written += round(sum(one.written for one in of_states) * part.size)
    collectives: list[Collective] = []
    if laid.measures:  # a launch for each list of gradients; over ranks one more, which decides
        launches += len(lists_of(buckets)) + bool(sharding.dims)
        collectives += [Collective(over, SQUARES) for over, _ in sharding.dims]
    of_rows = [
        (part.alike, rows) for i, part in enumerate(parts) if (rows := totals.parts.get(i)) is not None
    ]
    if of_rows:
        collectives.append(
            Collective("tp", sum(alike * t.numel() * t.element_size() for alike, t in of_rows))
        )
    kept, states = (sum(part.kept(first) for part in parts) for first in (0, 2))
    whole = (method.name, method.title, moved, kept, launches, tuple(collectives))
    return Step(*whole, states_read=read, states_written=written, states_kept=states)


class Laid(NamedTuple):
    """The slots of our optimizer, on parameters without memory, and its param groups."""

    parts: list[Part]
    groups: list[dict[str, Any]]
    measures: bool  # whether a step needs the norm of all gradients
    decides: bool  # whether the GPU decides it


def parts_of(
    cls: str,
    options: dict[str, Any],
    storage: Storage,
    found: Counter[Shard],
    sharding: Sharding,
) -> Laid:
    """Lays out an optimizer of that name."""
    shards = {kind: [shard for shard in found if shard.kind == kind] for kind in KINDS}
    params = {kind: [_tensor(shard, storage.param) for shard in shards[kind]] for kind in KINDS}
    groups: list[dict[str, Any]] = [
        {"params": params[kind], **own} for kind, own in KINDS.items() if params[kind]
    ]
    optimizer = getattr(fusedcalib, cls)(groups, **options | storage.options)
    needs = needs_of(optimizer.param_groups, None, None)
    asked = merged([recipe_of(optimizer.rule, group, needs) for group in optimizer.param_groups])
    recipes = [replace(r, flags=r.flags._replace(skips=needs.tentative)) for r in asked]
    parts = []
    for index, kind in enumerate(kind for kind in KINDS if params[kind]):
        group = optimizer.param_groups[index]
        for shard, param in zip(shards[kind], params[kind], strict=True):
            recipe = _kept_as(recipes[index], shard, sharding.mesh)
            make_state(optimizer.state, optimizer._engine.versions, param, recipe, group)
            states = states_of(optimizer.state, param, recipe)
            place = _place(shard, sharding.mesh)
            scales = scales_of(optimizer.state, param, recipe)
            slot = Slot(param, states, index, recipe, EXECUTOR, (0, 0, 0), place, scales=scales)
            parts.append(Part(slot, found[shard]))
    decides = needs.remote or needs.measure or needs.scaled or needs.tentative
    return Laid(parts, optimizer.param_groups, needs.measure, decides)


def _kept_as(recipe: Recipe, shard: Shard, mesh: Mesh | None) -> Recipe:
    """The recipe of a part: whether its states are kept in bytes depends on the whole parameter.

    Raises:
        ValueError: the part of a row begins within a block that has a scale.
    """
    storage = recipe.storage
    if not storage.least:
        return recipe
    whole = torch.empty(shard.whole, device="meta")
    if not in_bytes(whole, storage.least) or (whole.ndim == 1 and mesh is not None):
        states = tuple("cast" if kind in CODED else kind for kind in storage.states)
        return replace(recipe, storage=storage._replace(states=states))
    if shard.columns_cut and (width := math.prod(shard.shape[1:])) % BLOCK:
        raise ValueError(
            f"tensor parallel leaves {width} columns of a row of {math.prod(shard.whole[1:])}, which is no "
            f"multiple of the {BLOCK} that share a scale: take a smaller --tp, or other --dtypes"
        )
    return replace(recipe, storage=storage._replace(least=1))


def _tensor(shard: Shard, dtype: torch.dtype) -> torch.nn.Parameter:
    """A parameter of that shape without memory, its gradient as far from 16 bytes as FSDP2 would have it."""
    param = torch.nn.Parameter(torch.empty(shard.shape, dtype=dtype, device="meta"))
    first = shard.offset % (16 // dtype.itemsize)
    flat = torch.empty(first + shard.elements, dtype=dtype, device="meta")
    param.grad = flat[first:].view(shard.shape)
    return param


def _place(shard: Shard, mesh: Mesh | None) -> Place | None:
    """The place of the first part, as fusedcalib.layout.shards finds it for a DTensor."""
    if mesh is None:
        return None
    across = [i for i, (name, _) in enumerate(mesh.dims) if shard.columns_cut and name == "tp"]
    return Place(0, math.prod(shard.whole[1:]), True, mesh, shard.copies, tuple(across))


# -- what else there is


CHUNK, BLOCKS = 65_536, 320  # elements of a block, and blocks of a launch of torch's multi-tensor kernels
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # and tensors, by the number of lists


def composed(
    method: Method, subject: Subject, dtypes: str, found: Counter[Shard], sharding: Sharding
) -> Step:
    """A step of torch.optim, and what users put around it: see baselines.py."""
    storage = DTYPES[dtypes]
    if storage.options:
        raise NotAvailableError("torch.optim makes states in the dtype of the parameter")
    passes = [one for name in method.extras.values for one in AROUND[name]]
    passes += _steps(method.name, subject)
    shards = sorted(found.elements(), key=lambda shard: shard.offset)
    moved = launches = 0
    for one in passes:
        own = [shard for shard in shards if shard.kind == "weight" or not one.weights]
        moved += one.width(storage.param) * sum(shard.elements for shard in own)
        counts = [shard.elements for shard in own]
        launches += multi_tensor_launches(counts, TENSORS[one.lists]) if one.lists else len(counts)
    each = storage.kept(subject.states(), method.extras.ema is not None)
    kept = round(each * sum(shard.elements for shard in shards))
    sent = tuple(_sent(method, shards, sharding, storage.param))
    return Step(method.name, method.title, moved, kept, launches, sent)


def _steps(name: str, subject: Subject) -> tuple[Pass, ...]:
    """The step of torch.optim itself."""
    cls = getattr(torch.optim, subject.cls, None)
    if cls is None:
        raise NotAvailableError(f"torch.optim has no {subject.cls}")
    states = subject.states()
    if name == "torch_foreach":
        if (subject.cls, states) != ("AdamW", 2):
            raise NotAvailableError("counted for AdamW alone")
        return FOREACH_ADAMW
    if "fused" not in inspect.signature(cls).parameters:
        raise NotAvailableError(f"torch.optim.{subject.cls} has no fused form")
    counting = (Pass(lists=1),) if states else ()
    return (*counting, Pass(params=2, grads=1, states=2 * states, lists=2 + states))


def _sent(
    method: Method, shards: Iterable[Shard], sharding: Sharding, dtype: torch.dtype
) -> Iterator[Collective]:
    """The norm over each dimension that cuts parameters; the means of each tensor whose rows are cut."""
    if method.extras.clip is not None:
        for over, _ in sharding.dims:
            if over != "replicate":
                yield Collective(over, dtype.itemsize)
    if method.extras.gc:
        cut = (shard for shard in shards if shard.columns_cut and shard.kind == "weight")
        yield from (Collective("tp", dtype.itemsize * shard.shape[0]) for shard in cut)


def multi_tensor_launches(counts: Iterable[int], most: int) -> int:
    """Launches of a multi-tensor kernel over tensors of so many elements, `most` at a time."""
    launches = tensors = blocks = 0
    for count in counts:
        left, tensors = -(-count // CHUNK), tensors + 1
        while left:
            taken = min(left, BLOCKS - blocks)
            left, blocks = left - taken, blocks + taken
            if blocks == BLOCKS or (tensors == most and not left):
                launches, blocks, tensors = launches + 1, 0, int(left > 0)
    return launches + bool(blocks)
