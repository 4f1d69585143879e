"""Rules and stages as plain torch: the names of kernels/ops.py, and kernels/stages.py over them."""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import stages
from ..kernels.observed import observed
from ..kernels.spec import Spec
from ..layout.recipe import Recipe
from .source import Function, rebound
from .torch_storage import stochastic, trimmed, where


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
    "only_where": lambda condition, x: torch.where(condition, x, 0.0),
    "stored": _stored,
    "stochastic": stochastic,
    "trimmed": trimmed,
    "where": where,
}


class Stages(NamedTuple):
    """Functions of kernels/stages.py for a recipe, and what its rule makes of norms."""

    measured: Function
    measured_next: Function
    normed: Function
    stepped: Function
    projected: Function
    rounded: Function
    averaged: Function
    observed: Function
    factor: Function


@cache
def pipeline(recipe: Recipe, dtype: torch.dtype, compute: torch.dtype) -> Stages:
    """The stages of a recipe."""
    rule = recipe.rule
    trust = rule.trust and replace(rule.trust, squares=rebound(rule.trust.squares, NAMES))
    spec = Spec((dtype,), compute).of_rule(rebound(rule.update, NAMES), recipe.flags, trust)
    names = dict(NAMES)
    for name in ("prepared", "trusted", "centred", "directed"):  # of which others are made
        names[name] = rebound(getattr(stages, name), names)
    made = {name: rebound(getattr(stages, name), names) for name in Stages._fields[:-2]}
    made["observed"] = rebound(observed, names)
    of_spec = {name: made[name] if name == "projected" else partial(made[name], SPEC=spec) for name in made}
    factor = partial(rebound(trust.factor, NAMES), VARIANT=recipe.flags.variant) if trust else _one
    return Stages(**of_spec, factor=factor)


def _one(*_: Any) -> float:
    return 1.0
