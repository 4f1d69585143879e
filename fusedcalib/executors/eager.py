"""The eager executor: the rule's source as plain torch, tensor by tensor, on any device. Slow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels import stages
from ..kernels.storage import BLOCK, CODED, COMPANIONS
from ..layout.buckets import Bucket, Slot, TileShape
from ..layout.geometry import Geometry
from ..layout.recipe import Recipe
from ..layout.shards import Place
from ..noise import normals, rounding_words
from . import branches, torch_storage
from .source import rebound
from .torch_stages import NAMES, pipeline
from .triton.resident import sent

# Elements stepped at once: on a CPU few enough for the temporaries to stay in the cache, on a GPU few
# enough for them not to matter. Rows are never divided.
SMALL = {"cpu": 1 << 16}
LARGE = 1 << 24


class EagerExecutor:
    """Runs buckets as plain torch operations, a block of rows at a time."""

    name = "eager"
    branches = branches
    launches = False
    decider = None

    def shape(
        self, layout: Geometry, by_rows: bool, tensors: int, split: bool, whole: bool = False
    ) -> TileShape:
        """One tile a slot: the table is not read."""
        return TileShape(layout.rows, layout.columns, None)

    def prepare(self, buckets: list[Bucket]) -> None:
        """There is nothing to make ready."""

    def step_bucket(self, bucket: Bucket, part: str = "step") -> int:
        """Steps every slot of the bucket."""
        elements = SMALL.get(bucket.key.device.type, LARGE)
        flags = bucket.key.recipe.flags
        if not flags.needs(part):
            return 0
        scalars, measured = (
            bucket.scalars.tolist(),
            dict(zip(map(id, bucket.slots), bucket.statistics, strict=False)),
        )
        norms: Sequence[Tensor | None] = bucket.norms or [None] * len(bucket.slots)
        for slot, row, totals, sums in zip(
            bucket.slots, bucket.scalar_rows, bucket.totals, norms, strict=True
        ):
            h = stages.Numbers.of_row(scalars[row])
            tensors = slot.tensors()
            param = tensors[0]
            noise = bits = param  # of no use
            runs = _runs(slot, param)
            if flags.noise != "none":
                drawn = [normals(*run, int(h.step), slot.words, h.sigma, flags.noise) for run in runs]
                noise = _laid_out(bucket, param, np.concatenate(drawn))
            if flags.rounds:
                drawn = [rounding_words(*run, int(h.step), slot.words) for run in runs]
                bits = _laid_out(bucket, param, np.concatenate(drawn).astype(np.uint32).view(np.int32))
            of_rows = (param if t is None else t for t in (totals, slot.factors, slot.row_state))
            pitch = slot.place.pitch if slot.place else 0
            seen = measured.get(id(slot)) if part == "step" else None
            if seen is not None:
                seen.zero_()
            if sums is not None and part == "squares":
                sums.zero_()
                sums[-1] = param.numel()
            for block, scales in _blocks((*tensors, noise, bits, *of_rows), slot.scales, elements):
                *kept, z, b, total, factors, row_state = block
                rows = _Rows(part, total, pitch, factors, row_state, sums, seen)
                _step(bucket, (tuple(kept), scales), h, z, b, rows)
        return 0

    def squares(self, bucket: Bucket) -> float:
        """Sum of the squares of all gradients of the bucket."""
        return squares(bucket)


def _blocks(
    tensors: tuple[Tensor, ...], scales: tuple[Tensor, ...], elements: int
) -> Iterable[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """The tensors of a slot and its scales in pieces of about so many elements, along their rows."""
    param = tensors[0]
    if param.ndim == 0 or param.numel() <= elements:
        return [(tensors, scales)]
    rows = max(1, elements * param.shape[0] // param.numel())
    along = 0 if param.ndim > 1 else 1  # a vector is one row of scales
    of_scales = rows if param.ndim > 1 else rows // BLOCK
    pieces = zip(*(torch.split(t, rows) for t in tensors), strict=True)
    if not scales:
        return ((piece, ()) for piece in pieces)
    return zip(pieces, zip(*(torch.split(t, of_scales, along) for t in scales), strict=True), strict=True)


def _runs(slot: Slot, param: Tensor) -> list[tuple[int, int]]:
    """Where runs of elements that are here begin in the whole parameter, and their lengths."""
    rows = param.shape[0] if param.ndim else 1
    columns = param.numel() // rows
    place = slot.place or Place(0, columns)
    if place.pitch == columns:
        return [(place.first, param.numel())]
    return [(place.first + row * place.pitch, columns) for row in range(rows)]


def _laid_out(bucket: Bucket, param: Tensor, values: Any) -> Tensor:
    """Values of a parameter's elements, in the order in which the other executors walk it."""
    flat = sent(param.device, values)
    return flat.view(param.shape) if bucket.key.inner else flat.as_strided(param.shape, param.stride())


class _Rows(NamedTuple):
    """Of the rows of a block: part of a step, fp64 sums over ranks, length of the whole, factors, states.

    `norms`: sums of squares over the whole tensor; `seen`: its statistics.
    """

    part: str
    totals: Tensor
    pitch: int
    factors: Tensor
    state: Tensor
    norms: Tensor | None
    seen: Tensor | None


def _step(
    bucket: Bucket,
    kept: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    h: stages.Numbers,
    z: Tensor,
    bits: Tensor,
    rows: _Rows,
) -> None:
    recipe, split = bucket.key.recipe, bucket.key.split
    of = pipeline(recipe, kept[0][0].dtype, bucket.compute)
    flags = recipe.flags
    places = _places(recipe, *kept)
    p, g, *state = (torch_storage.decode(tensors, kind, bucket.compute) for tensors, kind in places)
    z = z.to(bucket.compute)
    if bucket.key.factored:
        g = _along_rows(rows.factors, g) * g
    values = (p, g, *state)
    inner = tuple(range(1, p.ndim))
    mean: Any = 0.0
    new = tuple(state)
    if rows.part == "sums":
        rows.totals.copy_(of.measured(values, h, z, 1.0).sum(dim=inner))
        return
    trust: Any = 1.0
    if rows.part == "step" and rows.norms is not None:
        *sums, count = rows.norms.unbind()
        trust = of.factor(tuple(sums), count, h.own).to(p.dtype)
    if rows.part != "finish":
        if split and flags.means:
            mean = _along_rows(rows.totals / rows.pitch, p).to(p.dtype)
        elif flags.means:
            mean = of.measured(values, h, z, trust).mean(dim=inner, keepdim=True)
    if rows.part == "squares":
        assert rows.norms is not None
        found = of.normed(values, h, z, (mean, trust, 0.0))
        rows.norms[:-1] += torch.stack([x.to(torch.float64).square().sum() for x in found])
        return
    if rows.part == "step":
        of_row: Any = 0.0
        if flags.row_state:
            mean, of_row = _row_states(bucket, values, h, z, mean, rows.state)
        p, new = of.stepped(values, h, z, (mean, trust, of_row))
    if flags.project:
        squares = p.square().sum(dim=inner, keepdim=True)
        if split and rows.part == "step":
            rows.totals.copy_(squares.view(-1))
        else:
            p = of.projected(p, _along_rows(rows.totals, p).to(p.dtype) if split else squares, h)
    p = of.rounded(p, bits)
    if rows.seen is not None:
        _observe(rows.seen, *of.observed(values, p))
    if not (split and flags.project and rows.part == "step"):  # it is of finished parameters
        new = of.averaged(p, new, h)
    written = [*zip((places[0], *places[2:]), (p, *new), strict=True)]
    for (tensors, kind), value in written[flags.still :]:
        torch_storage.encode(tensors, value, kind, bits)


def _observe(seen: Tensor, gradient: Tensor, change: Tensor, weight: Tensor, same: Tensor) -> None:
    """Takes a block into the statistics of a slot, as kernels/observed.py has them."""
    g, u, w = (x.to(torch.float64) for x in (gradient, change, weight))
    counts = [x.sum().to(torch.float64) for x in (same, ~gradient.isfinite())]
    seen[:-1] += torch.stack([(g * g).sum(), (u * u).sum(), (w * w).sum(), (g * u).sum(), *counts])
    torch.maximum(seen[-1], g.abs().max(), out=seen[-1])


def _row_states(
    bucket: Bucket, values: tuple[Tensor, ...], h: stages.Numbers, z: Tensor, first: Tensor, kept: Tensor
) -> tuple[Any, Tensor]:
    """Means and new states of rows, along them, of which the first mean is known."""
    recipe, p = bucket.key.recipe, values[0]
    measured_next = pipeline(recipe, bucket.key.dtypes[0], bucket.compute).measured_next
    inner, mean = tuple(range(1, p.ndim)), first
    if recipe.flags.centralize == "gradient":
        first = measured_next(values, h, z, mean).mean(dim=inner, keepdim=True)
    state: Tensor = rebound(stages.row_averaged, NAMES)(_along_rows(kept, p), first, h)
    kept.copy_(state.view(-1))
    if recipe.flags.centralize == "update":
        mean = measured_next(values, h, z, state.expand(p.shape)).mean(dim=inner, keepdim=True)
    return mean, state.expand(p.shape)


def _places(
    recipe: Recipe, tensors: tuple[Tensor, ...], scales: tuple[Tensor, ...]
) -> list[tuple[tuple[Tensor, ...], str]]:
    """Of parameter, gradient and states: what keeps them, and the kind of that."""
    kinds = recipe.kept
    if not kinds:
        return [((t,), "cast") for t in tensors]
    beside, of_codes = iter(tensors[len(tensors) - (kinds[0] in COMPANIONS) :]), iter(scales)
    with_more = {**dict.fromkeys(COMPANIONS, beside), **dict.fromkeys(CODED, of_codes)}
    return [
        ((t, next(with_more[kind])) if kind in with_more else (t,), kind)
        for t, kind in zip(tensors, kinds, strict=False)  # what is beside the parameter comes last
    ]


def _along_rows(values: Tensor, t: Tensor) -> Tensor:
    """A number for each row, to be broadcast over the tensor."""
    return values.view(-1, *(1,) * (t.ndim - 1))


def squares(bucket: Bucket) -> float:
    """Sum of the squares of all gradients of the bucket, in double: the host waits for it."""
    norms = [torch.linalg.vector_norm(_gradient(bucket, slot), dtype=torch.float64) for slot in bucket.slots]
    return float(torch.stack(norms).square().sum())


def _gradient(bucket: Bucket, slot: Slot) -> Tensor:
    g = slot.tensors()[1]
    return g if slot.factors is None else g.to(bucket.compute) * _along_rows(slot.factors, g)


EXECUTOR = EagerExecutor()


def why_not(device: torch.device, dtype: torch.dtype, by_name: bool) -> None:
    """Plain torch runs everywhere."""


def load() -> EagerExecutor:
    """What runs a bucket."""
    return EXECUTOR
