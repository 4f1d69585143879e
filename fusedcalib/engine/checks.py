"""What cannot be stepped, said before anything is written: what, where, and how to mend it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout.geometry import overlaps_itself
from ..layout.recipe import Recipe
from ..layout.shards import Place, local_of, place_of
from .check_storage import check_kept, check_storage
from .kept import is_there

PARAMETERS = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)


def describe(name: str, groups: Sequence[Mapping[str, Any]], group: int, index: int) -> str:
    """How an error names a parameter."""
    names = groups[group].get("param_names")
    label = f" ({names[index]})" if names else ""
    return f"{name}: parameter {index}{label} of group {group}"


def check_parameter(
    owner: str, param: Tensor, recipe: Recipe, state: Mapping[str, Any], offload: bool = False
) -> None:
    """Raises where the parameter, its gradient or its state cannot be stepped as they are.

    `offload`: states may lie on the host too.
    """
    grad = param.grad
    assert grad is not None
    leading, spread = recipe.laid_by(param), param
    place = _check_spread(owner, param, recipe)
    check_storage(owner, param, recipe)
    param, grad = local_of(param), local_of(grad)
    state = {k: local_of(v) if isinstance(v, Tensor) else v for k, v in state.items()}
    if grad.is_sparse or param.is_sparse:
        raise RuntimeError(
            f"{owner} has a sparse gradient, which is not supported; make it dense "
            "(embeddings: sparse=False) or use torch.optim.SparseAdam or torch.optim.SGD"
        )
    for what, t in (("parameter", param), ("gradient", grad)):
        if t.layout != torch.strided or (t.numel() and t.data_ptr() == 0):
            raise RuntimeError(f"{owner}: its {what} is not a dense tensor with memory of its own")
    if param.is_neg() or param.is_conj():
        raise RuntimeError(f"{owner} is a lazy negation or conjugate; resolve_neg() or resolve_conj() it")
    if param.dtype not in PARAMETERS:
        raise RuntimeError(f"{owner} has dtype {param.dtype}, expected one of {PARAMETERS}")
    if recipe.flags.by_rows and param.is_complex():
        raise ValueError(
            f"{owner} is complex, which has no row means and norms; set centralize=False, max_row_norm=None, "
            "or use a rule that keeps no state of rows"
        )
    if place and place.across and recipe.for_tensor(spread).flags.centres_trusted:
        raise RuntimeError(
            f'{owner}: its rows lie on several ranks, where centralize="update" would need the means of an '
            'update whose length is not known yet; set centralize="gradient", or divide it by dimension 0'
        )
    if place and recipe.flags.random and not (place.in_order and param.is_contiguous()):
        raise RuntimeError(
            f"{owner}: noise and stochastic rounding number its elements, which its placements leave in "
            f"pieces; shard it by its first {'or second ' if leading == 1 else ''}dimension"
        )
    if overlaps_itself(param):
        raise RuntimeError(
            f"{owner} overlaps itself in memory (an expanded tensor); clone() it before optimizing it"
        )
    if recipe.flags.l1 and param.is_complex():
        raise ValueError(f"{owner} is complex, for which there is no L1 penalty; set l1=0")
    if recipe.flags.rounding == "stochastic" and param.dtype == torch.float16:
        raise ValueError(
            f"{owner} is fp16, for which there is no stochastic rounding; use bf16 or set "
            "stochastic_rounding=False"
        )
    _check_like(f"{owner}: its gradient", grad, param)
    of_rows = (recipe.rule.row_state,) if recipe.rule.row_state else ()
    for name in (*recipe.own_states, *of_rows, *(recipe.rule.product or ())[:1]):
        if recipe.rule.counts and not is_there(state, name) and state.get("step", 0) > 0:
            raise KeyError(
                f"{owner} has been stepped without the state {name!r}: an option was switched on late "
                "or another optimizer's checkpoint was loaded; clear its state to start anew"
            )
    for name in recipe.states:
        if isinstance(state.get(name), Tensor):
            _check_like(f"{owner}: its state {name!r}", state[name], param, offload)
            if overlaps_itself(state[name]):
                raise RuntimeError(f"{owner}: its state {name!r} overlaps itself in memory")
    check_kept(owner, param, recipe, state, offload)


def _check_spread(owner: str, param: Tensor, recipe: Recipe) -> Place | None:
    """The place of a DTensor's local part; raises where it or its gradient cannot be stepped."""
    assert param.grad is not None
    spread, of_grad = (getattr(t, "placements", None) for t in (param, param.grad))
    if spread != of_grad:
        raise RuntimeError(
            f"{owner} has placements {spread}, but its gradient {of_grad}; redistribute the gradient"
        )
    if spread is None:
        return None
    try:
        place = place_of(param, recipe.laid_by(param))
    except RuntimeError as error:
        raise RuntimeError(f"{owner}: {error}; redistribute it") from None
    return place


def _check_like(what: str, t: Tensor, param: Tensor, offload: bool = False) -> None:
    here = t.device == param.device or (offload and t.device.type == "cpu")
    if t.shape != param.shape or not here:
        raise RuntimeError(
            f"{what} is {tuple(t.shape)} on {t.device}, "
            f"but the parameter is {tuple(param.shape)} on {param.device}"
        )
    if t.is_complex() != param.is_complex() or t.dtype not in PARAMETERS:
        raise RuntimeError(f"{what} has dtype {t.dtype}, but the parameter has {param.dtype}")


def check_slots(name: str, params: Sequence[Tensor]) -> None:
    """Raises where two parameters share memory: they would be stepped at once."""
    parts = [local_of(p) for p in params]
    seen = [p.data_ptr() for p in parts if p.numel()]
    if len(seen) != len(set(seen)):
        raise RuntimeError(
            f"{name}: two parameters share memory (a parameter is listed twice?); list it once"
        )
