"""Norms of whole tensors in numba loops: sums of squares of what a rule names, and its factor of them."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numba import njit

from ...kernels.storage import BLOCK as CODED_BLOCK
from ...layout.recipe import Recipe
from ..source import Function, folded
from .memory import Memory, double_at, set_double
from .noise import BLOCK, noise_maker
from .values import INNER

ADD_FREELY = {"reassoc", "nsz"}  # as in runs.py


def run_norms(recipe: Recipe, memory: Memory, scaled: Function, normed: Function) -> Function:
    """Adds the squares of a run to the sums at an address. Arguments as those of a run's step, and that."""
    trust = recipe.rule.trust
    assert trust is not None
    load, units_at, noise = memory.storage.load, memory.storage.units, recipe.flags.noise
    room, filled, noise_at = noise_maker(noise if noise == "gradient" else "none", memory.real)
    size = CODED_BLOCK if memory.coded else BLOCK
    nothing, with_squares, leave = _sums(trust.sums)

    # Not with fastmath, which would round what is squared otherwise than the step does.
    @njit(**INNER)
    def run(addresses, strides, length, h, factor, known, at, words, places, sums):
        space, totals = room(), nothing()
        for first in range(0, length, size):
            last, units = min(first + size, length), units_at(places, first // CODED_BLOCK)
            place = filled(space, at + first, last - first, h, words)
            for i in range(first, last):
                values = load(addresses, strides, i, units)
                found = normed(scaled(values, factor), h, noise_at(place, i - first), known)
                totals = with_squares(totals, found)
        leave(sums, totals)

    return cast(Function, run)


def _sums(count: int) -> tuple[Function, ...]:
    """Of so many sums: none yet, with the squares of some values, added to those at an address."""
    each = range(count)
    squares = "".join(f"t[{i}] + float64(x[{i}]) * float64(x[{i}]), " for i in each)
    added = "".join(f"set_double(sums, {i}, double_at(sums + {8 * i})[0] + t[{i}]); " for i in each)
    names: dict[str, Any] = {"float64": np.float64, "set_double": set_double, "double_at": double_at}
    lines = (f"def made(): return ({'0.0, ' * count})", f"def made(t, x): return ({squares})")
    nothing, with_squares = (_made(line, names, fastmath=ADD_FREELY) for line in lines)
    return nothing, with_squares, _made(f"def made(sums, t): {added}return", names)


def _made(line: str, names: dict[str, Any], **options: Any) -> Function:
    space: dict[str, Any] = {}
    exec(line, names, space)
    return cast(Function, njit(**INNER, **options)(space["made"]))


def factor_of(recipe: Recipe, memory: Memory, names: dict[str, Any]) -> Function:
    """`trust_of(sums, h)`: the factor of the sums at an address; 1 where the rule wants none."""
    trust, real = recipe.rule.trust, memory.real
    if trust is None or recipe.flags.trust == "none":

        @njit(**INNER)
        def one(sums, h):
            return real(1.0)

        return cast(Function, one)
    constants = {"VARIANT": recipe.flags.variant}
    factor = njit(folded(trust.factor, names, constants), **INNER)
    listed = "".join(f"double_at(sums + {8 * i})[0], " for i in range(trust.sums))
    count = f"double_at(sums + {8 * trust.sums})[0]"
    line = f"def made(sums, h): return real(factor(({listed}), {count}, h.own))"
    return _made(line, {"double_at": double_at, "real": real, "factor": factor})
