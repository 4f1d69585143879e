"""The eager executor: the rule's source as plain torch, tensor by tensor, on any device. Slow."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .kernels import stages
from .layout import Layout
from .noise import normals
from .rebind import Function, rebound
from .recipe import Recipe
from .tables import Bucket, Shape, Slot


def _where(condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, bool):
        return x if condition else y
    return torch.where(condition, x, y)


def _over(function: Any) -> Any:
    """A function of tensors as one of tensors and numbers."""

    def of_both(x: Any, y: Any) -> Any:
        like = x if isinstance(x, Tensor) else y
        return function(*(torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (x, y)))

    return of_both


# The names of kernels/ops.py, in plain torch.
NAMES = {
    "divide": operator.truediv,
    "sqrt": torch.sqrt,
    "negative": torch.neg,
    "absolute": torch.abs,
    "sign": torch.sign,
    "maximum": _over(torch.maximum),
    "minimum": _over(torch.minimum),
    "where": _where,
}


@cache
def _pipeline(recipe: Recipe) -> tuple[Function, Function, Function]:
    """`measured`, `stepped` and `projected` of kernels/stages.py for a recipe."""
    flags = {"RULE": rebound(recipe.rule.update, NAMES), "FLAGS": recipe.flags}
    names = {**NAMES, "prepared": rebound(stages.prepared, NAMES)}
    return (
        partial(rebound(stages.measured, names), **flags),
        partial(rebound(stages.stepped, names), **flags),
        rebound(stages.projected, names),
    )


# Elements stepped at once: on a CPU few enough for the temporaries to stay in the cache, on a GPU few
# enough for them not to matter. Rows are never divided.
BLOCK = {"cpu": 1 << 16}
LARGE_BLOCK = 1 << 24


class EagerExecutor:
    """Runs buckets as plain torch operations, a block of rows at a time."""

    name = "eager"

    def shape(self, layout: Layout, by_rows: bool, tensors: int) -> Shape:
        """One tile a slot: the table is not read."""
        return Shape(layout.rows, layout.columns, None)

    def run(self, bucket: Bucket) -> int:
        """Steps every slot of the bucket."""
        elements = BLOCK.get(bucket.key.device.type, LARGE_BLOCK)
        for slot, row in zip(bucket.slots, bucket.scalar_rows, strict=True):
            h = tuple(bucket.scalars[row].tolist())
            tensors = slot.tensors()
            noise = _noise(bucket, slot, tensors[0], h)
            for *block, z in _blocks((*tensors, noise), elements):
                _step(bucket, tuple(block), h, z)
        return 0


def _blocks(tensors: tuple[Tensor, ...], elements: int) -> Iterable[tuple[Tensor, ...]]:
    """The tensors of a slot in pieces of about so many elements, along their rows."""
    param = tensors[0]
    if param.ndim == 0 or param.numel() <= elements:
        return [tensors]
    rows = max(1, elements * param.shape[0] // param.numel())
    return zip(*(torch.split(t, rows) for t in tensors), strict=True)


def _noise(bucket: Bucket, slot: Slot, param: Tensor, h: tuple[float, ...]) -> Tensor:
    """Noise for a parameter, in the order in which the other executors walk it."""
    stage = bucket.key.recipe.flags.noise
    if stage == "none":
        return param  # of no use
    values = torch.from_numpy(normals(0, param.numel(), int(h[5]), slot.words, h[4], stage)).to(param.device)
    if bucket.key.inner:
        return values.view(param.shape)
    return values.as_strided(param.shape, param.stride())


def _step(bucket: Bucket, tensors: tuple[Tensor, ...], h: tuple[float, ...], z: Tensor) -> None:
    measured, stepped, projected = _pipeline(bucket.key.recipe)
    flags = bucket.key.recipe.flags
    p, g, *state = (t.to(bucket.compute) for t in tensors)
    z = z.to(bucket.compute)
    inner = tuple(range(1, p.ndim))
    mean: Any = 0.0
    if flags.centralize != "none":
        mean = measured(p, g, tuple(state), h, z).mean(dim=inner, keepdim=True)
    p, new = stepped(p, g, tuple(state), h, z, mean)
    if flags.project:
        p = projected(p, p.square().sum(dim=inner, keepdim=True), h)
    for target, value in zip((tensors[0], *tensors[2:]), (p, *new), strict=True):
        target.copy_(value)


EXECUTOR = EagerExecutor()
