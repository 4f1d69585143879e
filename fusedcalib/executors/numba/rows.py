"""The loops over a row, compiled by numba: the rule's own source between loads and stores.

Three things keep them at the speed of memory: addresses are dereferenced directly (an array view would
bring index checks), division follows IEEE instead of raising, and no scalar is of another type than the
values. Without fast-math NaN and infinity keep their meaning and every element is rounded as on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
from numba import njit
from numba.extending import overload

from ...kernels import stages
from ...layout.buckets import GEOMETRY
from ...layout.recipe import Recipe
from ..source import Function, folded
from .memory import INNER, Memory, double_at
from .noise import BLOCK, KEPT, bits_maker, noise_maker

_ADD_FREELY = {"reassoc", "nsz"}  # a sum may be vectorised; NaN and infinity keep their meaning


@njit(**INNER)
def _divide(x, y):
    return x / y


@njit(**INNER)
def _sqrt(x):
    return np.sqrt(x)


@njit(**INNER)
def _negative(x):
    return -x


@njit(**INNER)
def _absolute(x):
    return abs(x)


@njit(**INNER)
def _minimum(x, y):
    return x if (x < y or x != x) else y


@njit(**INNER)
def _maximum(x, y):
    return x if (x > y or x != x) else y


@njit(**INNER)
def _where(condition, x, y):
    return x if condition else y


def _sign(x):
    """Stands for its overload: -1, 0 or 1 in the type of x."""


@overload(_sign, jit_options=cast(Any, INNER))
def _sign_in(x):
    real = {32: np.float32, 64: np.float64}[x.bitwidth]
    minus, zero, one = real(-1), real(0), real(1)
    return lambda x: one if x > 0 else (minus if x < 0 else zero)


# The names of kernels/ops.py, for single elements.
NAMES = {
    "divide": _divide,
    "sqrt": _sqrt,
    "negative": _negative,
    "absolute": _absolute,
    "sign": _sign,
    "maximum": _maximum,
    "minimum": _minimum,
    "where": _where,
}


def _stages(recipe: Recipe, memory: Memory) -> tuple[Function, ...]:
    """`measured`, `stepped`, `projected`, `rounded`, `averaged` of kernels/stages.py for single elements."""
    constants = {"FLAGS": recipe.flags, "VARIANT": recipe.flags.variant}

    def compiled(function: Any, **names: Any) -> Function:
        own = {"stored": memory.as_stored, "stochastic": memory.stochastic}
        function = njit(folded(function, {**NAMES, **own, **names}, constants), **INNER)
        return cast(Function, function)

    rule = compiled(recipe.rule.update)
    prepared = compiled(stages.prepared)
    return (
        compiled(stages.measured, RULE=rule, prepared=prepared),
        compiled(stages.stepped, RULE=rule, prepared=prepared),
        compiled(stages.projected),
        compiled(stages.rounded),
        compiled(stages.averaged),
    )


class _Passes(NamedTuple):
    """Loops over one run of a row: its sum, that of the squares of parameters, the step, projection."""

    total: Function
    squares: Function
    step: Function
    project: Function


def _passes(recipe: Recipe, memory: Memory, scaled: Function) -> _Passes:
    """Those of a recipe.

    A run is walked in blocks: a block's elements are summed in their own type, blocks in double, fast and
    accurate; noise is made a block at a time. `at` is the index of the first element in its tensor.
    """
    measured, stepped, projected, rounded, averaged = _stages(recipe, memory)
    load, store, real, flags = memory.load, memory.store, memory.real, recipe.flags
    project = flags.project
    room, filled, noise = noise_maker(flags.noise, real)
    # What a row mean is taken of knows only noise on the gradient.
    sum_filled, sum_noise = noise_maker(flags.noise if flags.noise == "gradient" else "none", real)[1:]
    bit_room, bits_filled, bits = bits_maker(flags.rounding)
    size = BLOCK if flags.random else 1 << 62  # a step without chance needs no blocks

    @njit(**INNER, fastmath=_ADD_FREELY)
    def run_sum(addresses, strides, length, h, factor, at, words, kept):
        total, space = 0.0, room()
        for first in range(0, length, BLOCK):
            part, last = real(0.0), min(first + BLOCK, length)
            place = kept + 4 * first
            if kept == 0:
                place = sum_filled(space, at + first, last - first, h, words)
            for i in range(first, last):
                values = load(addresses, strides, i)
                part += measured(scaled(values, factor), h, sum_noise(place, i - first))
            total += part
        return total

    @njit(**INNER, fastmath=_ADD_FREELY)
    def run_squares(addresses, strides, length):
        total = 0.0
        for first in range(0, length, BLOCK):
            part = real(0.0)
            for i in range(first, min(first + BLOCK, length)):
                p = load(addresses, strides, i)[0]
                part += p * p
            total += part
        return total

    @njit(**INNER)
    def run_step(addresses, strides, length, h, factor, mean, at, words, kept):
        space, bit_space = room(), bit_room()
        for first in range(0, length, size):
            last = min(first + size, length)
            place = kept + 4 * first
            if kept == 0:
                place = filled(space, at + first, last - first, h, words)
            bit_place = bits_filled(bit_space, at + first, last - first, h, words)
            for i in range(first, last):
                values = load(addresses, strides, i)
                p, state = stepped(scaled(values, factor), h, noise(place, i - first), mean)
                p = rounded(p, bits(bit_place, i - first))
                if not project:
                    state = averaged(p, state, h)
                store(addresses, strides, i, p, state)

    @njit(**INNER)
    def run_project(addresses, strides, length, squares, h, at, words):
        bit_space = bit_room()
        for first in range(0, length, BLOCK):
            last = min(first + BLOCK, length)
            bit_place = bits_filled(bit_space, at + first, last - first, h, words)
            for i in range(first, last):
                values = load(addresses, strides, i)
                p = rounded(projected(values[0], squares, h), bits(bit_place, i - first))
                store(addresses, strides, i, p, averaged(p, values[2:], h))

    return _Passes(run_sum, run_squares, run_step, run_project)


def row_loop(recipe: Recipe, memory: Memory, scaled: Function, part: str) -> Function:
    """A row's part of a step: "sums" returns its sum, "finish" shortens it if it must be.

    "step" does all of it; "partial" takes its mean from the row's total and leaves its squares there.
    """
    total, squares, step, project = _passes(recipe, memory, scaled)
    real, flags, split = memory.real, recipe.flags, part == "partial"
    centred, projects, ema = flags.centralize != "none", flags.project, flags.ema
    room, filled, _ = noise_maker(flags.noise, real)
    twice = centred and flags.noise == "gradient" and not split  # the sum wants the noise, and the step
    start_of_run = _run_starter(memory)

    @njit(**INNER)
    def sum_row(row, addresses, strides, runs, length, h, factor, at, words, about, kept):
        found = 0.0
        for run in range(runs):
            start = start_of_run(row, addresses, run)
            found += total(start, strides, length, h, factor, at + run * length, words, kept)
        return found

    @njit(**INNER)
    def finish_row(row, addresses, strides, runs, length, h, at, words, found):
        if ema or np.sqrt(real(found)) > h.longest:
            for run in range(runs):
                start = start_of_run(row, addresses, run)
                project(start, strides, length, real(found), h, at + run * length, words)

    @njit(**INNER)
    def step_row(row, addresses, strides, runs, length, h, factor, at, words, about):
        mean, kept = real(0.0), 0
        if twice and runs == 1 and length <= KEPT:
            kept = filled(room(), at, length, h, words)
        if centred and split:
            mean = real(double_at(about[0])[0] / about[1])
        elif centred:
            found = sum_row(row, addresses, strides, runs, length, h, factor, at, words, about, kept)
            mean = real(found / (runs * length))
        for run in range(runs):
            start = start_of_run(row, addresses, run)
            step(start, strides, length, h, factor, mean, at + run * length, words, kept)
        found = 0.0
        if projects:
            for run in range(runs):
                found += squares(start_of_run(row, addresses, run), strides, length)
            if not split:
                finish_row(row, addresses, strides, runs, length, h, at, words, found)
        return found

    @njit(**INNER)
    def sums(row, addresses, strides, runs, length, h, factor, at, words, about):
        return sum_row(row, addresses, strides, runs, length, h, factor, at, words, about, 0)

    @njit(**INNER)
    def finish(row, addresses, strides, runs, length, h, factor, at, words, about):
        finish_row(row, addresses, strides, runs, length, h, at, words, double_at(about[0])[0])
        return 0.0

    return cast(Function, {"sums": sums, "finish": finish}.get(part, step_row))


def _run_starter(memory: Memory) -> Function:
    """`start_of_run(row, addresses, run)`: where a run of constant stride begins.

    `run` counts over all inner dimensions but the last.
    """
    shift, integers, inner = memory.shift, memory.integers, memory.inner
    geometry, strides_at = memory.geometry, memory.strides

    @njit(**INNER)
    def start_of_run(row, addresses, run):
        for back in range(inner - 1):
            dimension = inner - 2 - back
            size = integers(row + geometry + 8 * (GEOMETRY + dimension))[0]
            along = integers(row + strides_at + (dimension + 1) * geometry)
            addresses = shift(addresses, along, run % size)
            run //= size
        return addresses

    return cast(Function, start_of_run)


def row_squares(memory: Memory, scaled: Function) -> Function:
    """Sum of the squares of a row's gradients, in double. Arguments as those of the other loops."""
    load, start_of_run = memory.load, _run_starter(memory)

    @njit(**INNER, fastmath=_ADD_FREELY)
    def run_squares(addresses, strides, length, factor):
        total = 0.0
        for i in range(length):
            g = np.float64(scaled(load(addresses, strides, i), factor)[1])
            total += g * g
        return total

    @njit(**INNER)
    def squares(row, addresses, strides, runs, length, h, factor, at, words, about):
        total = 0.0
        for run in range(runs):
            total += run_squares(start_of_run(row, addresses, run), strides, length, factor)
        return total

    return cast(Function, squares)


def gradients(memory: Memory, factored: bool) -> tuple[Function, Function]:
    """`factor_of(factors, row)`, and loaded values with the gradient times its row's factor."""
    factor_at, one = memory.factor_at, memory.real(1.0)

    @njit(**INNER)
    def factor_of(factors, row):
        return factor_at(factors, row)[0] if factored else one

    @njit(**INNER)
    def scaled(values, factor):
        return (values[0], factor * values[1], *values[2:])

    @njit(**INNER)
    def unscaled(values, factor):
        return values

    return cast(Function, factor_of), cast(Function, scaled if factored else unscaled)
