"""The eager executor: the rule's source as plain torch, tensor by tensor, on any device. Slow."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels import stages
from ..kernels.spec import Spec
from ..kernels.storage import BLOCK, CODED, COMPANIONS
from ..layout.buckets import Bucket, Slot, TileShape
from ..layout.geometry import Geometry
from ..layout.recipe import Recipe
from ..layout.shards import Place
from ..noise import normals, rounding_words
from . import branches, torch_storage
from .source import Function, rebound
from .torch_storage import stochastic, trimmed, where
from .triton.resident import sent


def _sqrt(x: Tensor) -> Tensor:
    """The root, correctly rounded: torch's on a CPU is off by one in the last place for a fifth of fp32."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return x.to(torch.float64).sqrt().to(torch.float32)
    return x.sqrt()


def _over(function: Any) -> Any:
    """A function of tensors as one of tensors and numbers."""

    def of_both(x: Any, y: Any) -> Any:
        like = x if isinstance(x, Tensor) else y
        # Filled on the device: as_tensor would copy the number there, for which the host waits.
        return function(*(v if isinstance(v, Tensor) else like.new_full((), v) for v in (x, y)))

    return of_both


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a tensor of a dtype would keep it."""
    return x.to(dtype).to(x.dtype)


# The names of kernels/ops.py, in plain torch.
NAMES = {
    "divide": operator.truediv,
    "sqrt": _sqrt,
    "negative": torch.neg,
    "absolute": torch.abs,
    "sign": torch.sign,
    "maximum": _over(torch.maximum),
    "minimum": _over(torch.minimum),
    "stored": _stored,
    "stochastic": stochastic,
    "trimmed": trimmed,
    "where": where,
}


@cache
def _pipeline(recipe: Recipe, dtype: torch.dtype, compute: torch.dtype) -> tuple[Function, ...]:
    """`measured`, `stepped`, `projected`, `rounded` and `averaged` of kernels/stages.py for a recipe."""
    spec = Spec((dtype,), compute).of_rule(rebound(recipe.rule.update, NAMES), recipe.flags)
    names = {**NAMES, "prepared": rebound(stages.prepared, NAMES)}
    return (
        partial(rebound(stages.measured, names), SPEC=spec),
        partial(rebound(stages.stepped, names), SPEC=spec),
        rebound(stages.projected, names),
        partial(rebound(stages.rounded, names), SPEC=spec),
        partial(rebound(stages.averaged, names), SPEC=spec),
    )


# Elements stepped at once: on a CPU few enough for the temporaries to stay in the cache, on a GPU few
# enough for them not to matter. Rows are never divided.
SMALL = {"cpu": 1 << 16}
LARGE = 1 << 24


class EagerExecutor:
    """Runs buckets as plain torch operations, a block of rows at a time."""

    name = "eager"
    decider = None
    launches = False
    branches = branches

    def shape(self, layout: Geometry, by_rows: bool, tensors: int, split: bool) -> TileShape:
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
        scalars = bucket.scalars.tolist()
        for slot, row, totals in zip(bucket.slots, bucket.scalar_rows, bucket.totals, strict=True):
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
            of_rows = (param if t is None else t for t in (totals, slot.factors))
            pitch = slot.place.pitch if slot.place else 0
            for block, scales in _blocks((*tensors, noise, bits, *of_rows), slot.scales, elements):
                *kept, z, b, total, factors = block
                _step(bucket, (tuple(kept), scales), h, z, b, _Rows(part, total, pitch, factors))
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
    """Of the rows of a block: which part of a step, fp64 sums over ranks, length of the whole, factors."""

    part: str
    totals: Tensor
    pitch: int
    factors: Tensor


def _step(
    bucket: Bucket,
    kept: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    h: stages.Numbers,
    z: Tensor,
    bits: Tensor,
    rows: _Rows,
) -> None:
    recipe, split = bucket.key.recipe, bucket.key.split
    measured, stepped, projected, rounded, averaged = _pipeline(recipe, kept[0][0].dtype, bucket.compute)
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
        rows.totals.copy_(measured(values, h, z).sum(dim=inner))
        return
    if rows.part == "step":
        if split and flags.centralize != "none":
            mean = _along_rows(rows.totals / rows.pitch, p).to(p.dtype)
        elif flags.centralize != "none":
            mean = measured(values, h, z).mean(dim=inner, keepdim=True)
        p, new = stepped(values, h, z, mean)
    if flags.project:
        squares = p.square().sum(dim=inner, keepdim=True)
        if split and rows.part == "step":
            rows.totals.copy_(squares.view(-1))
        else:
            p = projected(p, _along_rows(rows.totals, p).to(p.dtype) if split else squares, h)
    p = rounded(p, bits)
    if not (split and flags.project and rows.part == "step"):  # it is of finished parameters
        new = averaged(p, new, h)
    written = [*zip((places[0], *places[2:]), (p, *new), strict=True)]
    for (tensors, kind), value in written[flags.still :]:
        torch_storage.encode(tensors, value, kind, bits)


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
