"""Stacks of matrices that cannot be stepped as such, and parameters that are taken for something else."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..layout.recipe import Asked, Recipe
from ..layout.row_scales import row_factors_of
from ..layout.shards import local_of
from ..layout.stacks import has_rows_first, may_be_stack
from ..layout.storage import MASTER, REMAINDER
from ..option import LAST, OF_THREE
from .checks import describe
from .flat import warn_of_flat
from .slots import Live


def check_stack(owner: str, param: Tensor, recipe: Recipe, state: Mapping[str, Any]) -> None:
    """Raises where a group says which dimensions are the matrix, and the rows are not to be had.

    Args:
        owner: what errors call the parameter.
        param: the parameter, which has a gradient.
        recipe: of its group.
        state: its own.

    Raises:
        ValueError: it has more dimensions than the group counts on, or factors for rows of dimension 0.
        RuntimeError: its rows, or those of its gradient or a state, are not at one distance in memory.
    """
    leading, dims = recipe.leading(param), recipe.matrix_dims
    if leading == 1:
        return
    if param.ndim != 3 and dims == OF_THREE:
        raise ValueError(
            f"{owner} has {param.ndim} dimensions, of which matrix_dims={dims} are not the last; give its "
            f"group matrix_dims={LAST}, or put it in a group with matrix_dims=None"
        )
    if recipe.laid_by(param) > 1 and row_factors_of(param) is not None:
        raise ValueError(
            f"{owner}: its gradient has factors for rows of dimension 0 (fusedcalib.nn.scale_in_step), but "
            f"matrix_dims={dims} makes rows of others; put it in a group with matrix_dims=None"
        )
    kept = {f"state {name!r}": state.get(name) for name in (*recipe.states, MASTER, REMAINDER)}
    for what, t in {"parameter": param, "gradient": param.grad, **kept}.items():
        if isinstance(t, Tensor) and not has_rows_first(local_of(t), leading):
            shape, strides = tuple(local_of(t).shape), local_of(t).stride()
            raise RuntimeError(
                f"{owner}: with matrix_dims={dims} a row is an index of all dimensions but the last, and the "
                f"rows of its {what} {shape} with strides {strides} do not lie at one distance; make it "
                "contiguous, or put the parameter in a group with matrix_dims=None"
            )


def warn_of_stack(name: str, live: Iterable[Live], asked: Asked) -> bool:
    """Says of the first parameter that looks like a stack how its rows are understood; whether it did.

    Args:
        name: of the optimizer.
        live: its parameters.
        asked: what the param groups ask for.
    """
    for group, index, param in live:
        recipe = asked.recipes[group]
        if recipe.matrix_dims or not may_be_stack(param.shape):
            continue
        flags = recipe.for_tensor(param).flags
        done = {"centralize": flags.centralize != "none", "max_row_norm": flags.project}
        options = " or ".join(option for option, on in done.items() if on)
        if options:
            shape = tuple(param.shape)
            warnings.warn(
                f"{describe(name, asked.groups, group, index)} is {shape}, and {options} takes all "
                f"{shape[1]} x {shape[2]} elements of an index of dimension 0 for one row; if it is "
                f"{shape[0]} matrices, as the weights of experts, give its group matrix_dims={LAST}: each "
                f"has {shape[1]} rows then",
                stacklevel=2,
            )
            return True
    return False


class RowWarnings:
    """Warns where rows are not what they may be taken for, each once in an optimizer."""

    def __init__(self) -> None:
        self._flat = self._stack = False

    def look(self, name: str, live: list[Live], unknown: list[Live], asked: Asked) -> None:
        """Looks at the parameters of a step, and at those that are not laid out yet."""
        if not self._flat:
            flags = [asked.recipes[each.group].flags for each in live]
            asks = [f.centralize != "none" or f.project for f in flags]
            by_rows = [each.param for each, on in zip(live, asks, strict=True) if on]
            self._flat = warn_of_flat(name, by_rows)
        if not self._stack:
            self._stack = warn_of_stack(name, unknown, asked)
