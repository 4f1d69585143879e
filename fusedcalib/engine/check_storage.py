"""What cannot be kept in the form that is asked for, said before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..kernels.storage import BLOCK, CODED
from ..layout.recipe import Recipe
from ..layout.storage import (
    MASTER,
    REMAINDER,
    in_bytes,
    names_of,
    remainder_shape,
    scales_shape,
)


def check_storage(owner: str, param: Tensor, recipe: Recipe) -> None:
    """Raises where a parameter (the whole of it) cannot be kept as its group asks."""
    asked = recipe.storage
    if asked.master in ("split16", "split8") and param.dtype == torch.float16:
        raise ValueError(
            f"{owner} is fp16, which master_weights={asked.master!r} does not split: that is for bf16; use "
            'master_weights="float32"'
        )
    wide = param.dtype == torch.float64 or param.is_complex()
    if wide and asked.states:
        form = "8bit" if {*asked.states} & {*CODED} else "bfloat16_stochastic"
        raise ValueError(
            f"{owner} has dtype {param.dtype}, whose states cannot be kept as {form!r}; use "
            "state_dtype=None for it, in a param group of its own"
        )
    if {*asked.states} & {*CODED} and in_bytes(param, asked.least):
        _check_cut(owner, param)


def _check_cut(owner: str, param: Tensor) -> None:
    """Raises where ranks have parts of rows that begin within a block."""
    spread: Any = param
    for dimension, placement in enumerate(getattr(spread, "placements", ())):
        ranks, dim = spread.device_mesh.size(dimension), getattr(placement, "dim", 0)
        if dim == 0 or ranks == 1:
            continue
        if dim > 1 or not _in_blocks(param, ranks):
            width = prod(param.shape[1:])
            fits = next((n for n in range(ranks - 1, 1, -1) if _in_blocks(param, n)), 1)
            raise RuntimeError(
                f"{owner}: its rows of {width} elements are cut by {ranks} ranks within blocks of {BLOCK} "
                'that share a scale; use state_dtype="float32" for it (in a param group of its own)'
                + (f", or split it over {fits} ranks at most" if dim == 1 and fits > 1 else "")
            )


def _in_blocks(param: Tensor, ranks: int) -> bool:
    """Whether every one of so many ranks has whole blocks of rows that are split by their first dimension."""
    columns, part = prod(param.shape[1:]), -(-param.shape[1] // ranks) * prod(param.shape[2:])
    return part % BLOCK == 0 and -(-scales_shape(param.shape)[1] // ranks) * BLOCK == part and columns > 0


def check_kept(owner: str, param: Tensor, recipe: Recipe, state: Mapping[str, Any]) -> None:
    """Raises where what is here of a state in bytes, or beside the parameter, is not as it should be."""
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name in recipe.own_states:
        codes, scales = names_of(name, "signed")
        if codes in state:
            wanted[codes] = tuple(param.shape), torch.uint8
            wanted[scales] = scales_shape(param.shape), torch.float32
    if MASTER in state:
        wanted[MASTER] = tuple(param.shape), torch.float32
    if REMAINDER in state:
        form = "split16" if state[REMAINDER].ndim > param.ndim else "split8"
        wanted[REMAINDER] = remainder_shape(param.shape, form), torch.uint8
    for key, (shape, dtype) in wanted.items():
        found = state.get(key)
        if found is None:
            raise KeyError(f"{owner}: its state lacks {key!r}; load a checkpoint that has it, or clear it")
        if tuple(found.shape) != shape or found.dtype != dtype or found.device != param.device:
            raise RuntimeError(
                f"{owner}: its state {key!r} is {tuple(found.shape)} of {found.dtype} on {found.device}, but "
                f"must be {shape} of {dtype} on {param.device}; load a checkpoint of the same parameters"
            )
        if dtype == torch.uint8 and key != REMAINDER and not found.is_contiguous():
            raise RuntimeError(f"{owner}: its state {key!r} must be contiguous; load it anew")
