"""What cannot be kept in the form that is asked for, said before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels.storage import BLOCK, CODED
from ..layout.geometry import overlaps_itself
from ..layout.recipe import Recipe
from ..layout.stacks import leading_dims
from ..layout.storage import (
    MASTER,
    REMAINDER,
    in_bytes,
    leading_of,
    names_of,
    remainder_shape,
    scales_shape,
)
from ..option import LAST


def check_storage(owner: str, param: Tensor, recipe: Recipe) -> None:
    """Raises where a parameter (the whole of it) cannot be kept as its group asks."""
    asked = recipe.storage
    check_row_state(owner, param, recipe)
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
    leading = recipe.leading(param)
    if {*asked.states} & {*CODED} and in_bytes(param, asked.least, leading):
        _check_cut(owner, param, leading)


def check_row_state(owner: str, param: Tensor, recipe: Recipe) -> None:
    """Raises where ranks share rows of which each keeps a number, and one of them could not."""
    leading, spread = recipe.laid_by(param), cast(Any, param)
    split: dict[int, list[int]] = {}
    for i, placement in enumerate(getattr(spread, "placements", ())):
        if getattr(placement, "dim", -1) >= leading and spread.device_mesh.size(i) > 1:
            split.setdefault(placement.dim, []).append(spread.device_mesh.size(i))
    if not recipe.rule.row_state or not split:
        return
    if recipe.for_tensor(param).flags.centralize != "none":
        raise ValueError(
            f"{owner}: its rows lie on several ranks, and have to be centred and to keep a number each; set "
            "centralize=False for it, or divide it by rows (dimension 0)"
        )
    if any(not part for dim, counts in split.items() for part in _parts(param.shape[dim], counts)):
        raise ValueError(
            f"{owner} is {tuple(param.shape)}, of which some of the ranks that share its rows have nothing: "
            f"{recipe.rule.row_state!r}, a number for each row, would not be the same on all; step it by "
            "another rule (AdamW), or replicate it"
        )


def _check_cut(owner: str, param: Tensor, leading: int) -> None:
    """Raises where ranks have parts of rows that begin within a block."""
    spread: Any = param
    cuts = [(spread.device_mesh.size(i), p) for i, p in enumerate(getattr(spread, "placements", ()))]
    split = [(ranks, p.dim) for ranks, p in cuts if getattr(p, "dim", 0) >= leading and ranks > 1]
    counts, dims = [ranks for ranks, _ in split], {dim for _, dim in split}
    if not dims or (dims == {leading} and _in_blocks(param, counts, leading)):
        return
    width, ranks = prod(param.shape[leading:]), prod(counts)
    tried = range(ranks - 1, 1, -1) if dims == {leading} else ()
    fits = next((n for n in tried if _in_blocks(param, [n], leading)), 1)
    raise RuntimeError(
        f"{owner}: its rows of {width} elements are cut by {ranks} ranks within blocks of {BLOCK} "
        'that share a scale; use state_dtype="float32" for it (in a param group of its own)'
        + (f", or split it over {fits} ranks at most" if fits > 1 else "")
    )


def _in_blocks(param: Tensor, counts: list[int], leading: int) -> bool:
    """Whether ranks have whole blocks of rows, whose first dimension is split by so many in either order."""
    inner, blocks = prod(param.shape[leading + 1 :]), scales_shape(param.shape, leading)[-1]
    return all(
        -(-len(part) * inner // BLOCK) == len(of_scales) and (part.start * inner % BLOCK == 0 or not part)
        for order in (counts, counts[::-1])
        for part, of_scales in zip(_parts(param.shape[leading], order), _parts(blocks, order), strict=True)
    )


def _parts(size: int, counts: list[int]) -> list[range]:
    """The parts of a dimension that is split again and again, as torch.chunk does it."""
    parts = [range(size)]
    for n in counts:
        of_each = [(part, -(-len(part) // n)) for part in parts]
        parts = [part[i * step : (i + 1) * step] for part, step in of_each for i in range(n)]
    return parts


def check_kept(
    owner: str, param: Tensor, recipe: Recipe, state: Mapping[str, Any], offload: bool = False
) -> None:
    """Raises where what is here of a state in bytes, or beside the parameter, is not as it should be."""
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if (of_rows := recipe.rule.row_state) and of_rows in state:
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        wanted[of_rows] = tuple(param.shape[: recipe.laid_by(param)]) or (1,), wide
    for name in recipe.own_states:
        codes, scales = names_of(name, "signed")
        if codes in state or scales in state:
            wanted[codes] = tuple(param.shape), torch.uint8
            # A step converts those of rows that are no longer asked for.
            stacked = scales in state and leading_of(state[scales]) > 1
            leading = leading_dims(param.shape, LAST) if stacked else 1
            wanted[scales] = scales_shape(param.shape, leading), torch.float32
    if MASTER in state:
        wanted[MASTER] = tuple(param.shape), torch.float32
    if REMAINDER in state:
        form = "split16" if state[REMAINDER].ndim > param.ndim else "split8"
        wanted[REMAINDER] = remainder_shape(param.shape, form), torch.uint8
    for key, (shape, dtype) in wanted.items():
        found = state.get(key)
        if found is None:
            raise KeyError(f"{owner}: its state lacks {key!r}; load a checkpoint that has it, or clear it")
        here = found.device == param.device or (offload and found.device.type == "cpu")
        if tuple(found.shape) != shape or found.dtype != dtype or not here:
            raise RuntimeError(
                f"{owner}: its state {key!r} is {tuple(found.shape)} of {found.dtype} on {found.device}, but "
                f"must be {shape} of {dtype} on {param.device}; load a checkpoint of the same parameters"
            )
        in_pieces = found.ndim > param.ndim and found.stride(-1) != 1  # the two bytes of a remainder
        apart = key in (REMAINDER, MASTER) and not in_pieces and not overlaps_itself(found)
        if not apart and not found.is_contiguous():
            raise RuntimeError(f"{owner}: its state {key!r} must be contiguous; load it anew")
