"""The eager executor: the rule's source as plain torch, tensor by tensor, on any device. Slow."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch

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


class EagerExecutor:
    """Runs buckets as plain torch operations. Allocates temporaries of a parameter's size."""

    name = "eager"

    def shape(self, layout: Layout, centred: bool) -> Shape:
        """One tile a slot: tensors are stepped whole."""
        return Shape(layout.rows, layout.columns, None)

    def run(self, bucket: Bucket) -> int:
        """Steps every slot of the bucket."""
        measured, stepped = _pipeline(bucket.key.recipe)
        for slot, row in zip(bucket.slots, bucket.scalar_rows, strict=True):
            tensors = slot.tensors()
            p, g, *state = (t.to(bucket.compute) for t in tensors)
            h = tuple(bucket.scalars[row].tolist())
            mean: Any = 0.0
            if bucket.key.recipe.centralize != "none":
                x = measured(p, g, tuple(state), h)
                mean = x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)
            p, new = stepped(p, g, tuple(state), h, mean)
            for target, value in zip((tensors[0], *tensors[2:]), (p, *new), strict=True):
                target.copy_(value)
        return 0


EXECUTOR = EagerExecutor()
