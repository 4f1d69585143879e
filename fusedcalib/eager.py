"""The eager executor: the rule's source as plain torch, tensor by tensor, on any device. Slow."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .kernels import stages
from .layout import Layout
from .rebind import Function, rebound
from .recipe import Recipe
from .tables import Bucket, Shape


def _where(condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, bool):
        return x if condition else y
    return torch.where(condition, x, y)


# The names of kernels/ops.py, in plain torch.
NAMES = {
    "divide": torch.div,
    "sqrt": torch.sqrt,
    "maximum": torch.maximum,
    "where": _where,
}


@cache
def _pipeline(recipe: Recipe) -> tuple[Function, Function]:
    """`measured` and `stepped` of kernels/stages.py for a recipe."""
    flags = {
        "RULE": rebound(recipe.rule.update, NAMES),
        "VARIANT": recipe.variant,
        "MAXIMIZE": recipe.maximize,
        "DECAY": recipe.decay,
        "CENTRALIZE": recipe.centralize,
    }
    names = {**NAMES, "prepared": rebound(stages.prepared, NAMES)}
    return (
        partial(rebound(stages.measured, names), **flags),
        partial(rebound(stages.stepped, names), **flags),
    )


# Elements stepped at once: on a CPU few enough for the temporaries to stay in the cache, on a GPU few
# enough for them not to matter. Rows are never divided.
BLOCK = {"cpu": 1 << 16}
LARGE_BLOCK = 1 << 24


class EagerExecutor:
    """Runs buckets as plain torch operations, a block of rows at a time."""

    name = "eager"

    def shape(self, layout: Layout, centred: bool) -> Shape:
        """One tile a slot: the table is not read."""
        return Shape(layout.rows, layout.columns, None)

    def run(self, bucket: Bucket) -> int:
        """Steps every slot of the bucket."""
        elements = BLOCK.get(bucket.key.device.type, LARGE_BLOCK)
        for slot, row in zip(bucket.slots, bucket.scalar_rows, strict=True):
            h = tuple(bucket.scalars[row].tolist())
            for block in _blocks(slot.tensors(), elements):
                _step(bucket, block, h)
        return 0


def _blocks(tensors: tuple[Tensor, ...], elements: int) -> Iterable[tuple[Tensor, ...]]:
    """The tensors of a slot in pieces of about so many elements, along their rows."""
    param = tensors[0]
    if param.ndim == 0 or param.numel() <= elements:
        return [tensors]
    rows = max(1, elements * param.shape[0] // param.numel())
    return zip(*(torch.split(t, rows) for t in tensors), strict=True)


def _step(bucket: Bucket, tensors: tuple[Tensor, ...], h: tuple[float, ...]) -> None:
    measured, stepped = _pipeline(bucket.key.recipe)
    p, g, *state = (t.to(bucket.compute) for t in tensors)
    mean: Any = 0.0
    if bucket.key.recipe.centralize != "none":
        x = measured(p, g, tuple(state), h)
        mean = x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    p, new = stepped(p, g, tuple(state), h, mean)
    for target, value in zip((tensors[0], *tensors[2:]), (p, *new), strict=True):
        target.copy_(value)


EXECUTOR = EagerExecutor()
