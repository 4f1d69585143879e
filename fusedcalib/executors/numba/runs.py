"""The loops over a run of a row, compiled by numba: the rule's own source between loads and stores.

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
from ...kernels.observed import observed
from ...kernels.storage import BLOCK as CODED_BLOCK
from ...layout.recipe import Recipe
from ..source import Function, folded
from .elements import trimmed
from .memory import Memory
from .noise import BLOCK, bits_maker, noise_maker
from .norms import run_norms
from .observed import observer
from .values import INNER

ADD_FREELY = {"reassoc", "nsz"}  # a sum may be vectorised; NaN and infinity keep their meaning


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


def _only_where(condition, x):
    """Stands for its overload: x, or 0 in its type."""


@overload(_only_where, jit_options=cast(Any, INNER))
def _only_where_in(condition, x):
    zero = {32: np.float32, 64: np.float64}[x.bitwidth](0)
    return lambda condition, x: x if condition else zero


# The names of kernels/ops.py, for single elements.
NAMES = {
    "divide": _divide,
    "sqrt": _sqrt,
    "negative": _negative,
    "absolute": _absolute,
    "sign": _sign,
    "maximum": _maximum,
    "minimum": _minimum,
    "only_where": _only_where,
    "where": _where,
}


class Stages(NamedTuple):
    """Functions of kernels/stages.py for single elements; `normed` is None where no norm is wanted."""

    measured: Function
    measured_next: Function
    normed: Function | None
    stepped: Function
    projected: Function
    rounded: Function
    averaged: Function
    observed: Function


def stages_of(recipe: Recipe, memory: Memory) -> Stages:
    """Those of a recipe."""
    constants = {"FLAGS": recipe.flags, "VARIANT": recipe.flags.variant}

    def compiled(function: Any, **names: Any) -> Function:
        own = {"stored": memory.as_stored, "stochastic": memory.stochastic, "trimmed": trimmed}
        function = njit(folded(function, {**NAMES, **own, **names}, constants), **INNER)
        return cast(Function, function)

    rule, trust = compiled(recipe.rule.update), recipe.rule.trust
    prepared = compiled(stages.prepared)
    centred, trusted = compiled(stages.centred, prepared=prepared), compiled(stages.trusted)
    directed = compiled(stages.directed, RULE=rule)
    normed = None
    if trust and recipe.flags.trust != "none":
        squares = compiled(trust.squares)
        normed = compiled(stages.normed, SQUARES=squares, centred=centred, directed=directed)
    return Stages(
        compiled(stages.measured, RULE=rule, prepared=prepared, trusted=trusted),
        compiled(stages.measured_next, RULE=rule, prepared=prepared),
        normed,
        compiled(stages.stepped, centred=centred, directed=directed, trusted=trusted),
        compiled(stages.projected),
        compiled(stages.rounded),
        compiled(stages.averaged),
        compiled(observed),
    )


def row_average() -> Function:
    """`row_averaged` of kernels/stages.py for single elements."""
    return cast(Function, njit(folded(stages.row_averaged, NAMES, {}), **INNER))


class Passes(NamedTuple):
    """Loops over one run of a row: its sums, that of the squares of parameters, the step, projection.

    `norms` leaves what a rule wants of the whole tensor; None where it wants nothing.
    """

    norms: Function | None
    total: Function
    next_total: Function
    squares: Function
    step: Function
    project: Function


def passes_of(recipe: Recipe, memory: Memory, scaled: Function) -> Passes:
    """The loops of a recipe.

    A run is walked in blocks: a block's elements are summed in their own type, blocks in double, fast and
    accurate; noise is made a block at a time. `at` is the index of the first element in its tensor.
    """
    measured, measured_next, normed, *others = stages_of(recipe, memory)
    norms = run_norms(recipe, memory, scaled, normed) if normed else None
    total, next_total = (_sum_of(recipe, memory, scaled, one) for one in (measured, measured_next))
    return Passes(norms, total, next_total, _squares(memory), *_steps(recipe, memory, scaled, *others))


def _sum_of(recipe: Recipe, memory: Memory, scaled: Function, measured: Function) -> Function:
    """What the mean of a row is taken of, added up; `known`: a factor, a mean or a state, known before."""
    load, real, noise = memory.storage.load, memory.real, recipe.flags.noise
    units_at = memory.storage.units
    size = CODED_BLOCK if memory.coded else BLOCK
    room = noise_maker(noise, real)[0]
    # What a row mean is taken of knows only noise on the gradient.
    sum_filled, sum_noise = noise_maker(noise if noise == "gradient" else "none", real)[1:]

    @njit(**INNER, fastmath=ADD_FREELY)
    def run_sum(addresses, strides, length, h, factor, at, words, about, known):
        kept, places = about
        total, space = 0.0, room()
        for first in range(0, length, size):
            part, last = real(0.0), min(first + size, length)
            place, units = kept + 4 * first, units_at(places, first // CODED_BLOCK)
            if kept == 0:
                place = sum_filled(space, at + first, last - first, h, words)
            for i in range(first, last):
                values = load(addresses, strides, i, units)
                part += measured(scaled(values, factor), h, sum_noise(place, i - first), known)
            total += part
        return total

    return cast(Function, run_sum)


def _squares(memory: Memory) -> Function:
    """The squares of the parameters of a row, added up."""
    load, real, units_at = memory.storage.load, memory.real, memory.storage.units
    size = CODED_BLOCK if memory.coded else BLOCK

    @njit(**INNER, fastmath=ADD_FREELY)
    def run_squares(addresses, strides, length, places):
        total = 0.0
        for first in range(0, length, size):
            part, units = real(0.0), units_at(places, first // CODED_BLOCK)
            for i in range(first, min(first + size, length)):
                p = load(addresses, strides, i, units)[0]
                part += p * p
            total += part
        return total

    return cast(Function, run_squares)


def _steps(
    recipe: Recipe,
    memory: Memory,
    scaled: Function,
    stepped: Function,
    projected: Function,
    rounded: Function,
    averaged: Function,
    observed: Function,
) -> tuple[Function, Function]:
    """The step, and the projection of rows that are too long."""
    load, store, flags = memory.storage.load, memory.storage.store, recipe.flags
    store_step = memory.storage.store_states if flags.still else store
    units_at, byte_room = memory.storage.units, memory.storage.room
    keep, encode = memory.storage.keep, memory.storage.encode
    project, (nothing, taken_in, leave) = flags.project, observer(flags.statistics, observed, memory.real)
    room, filled, noise = noise_maker(flags.noise, memory.real)
    bit_room, bits_filled, bits = bits_maker(flags.rounds)
    size = BLOCK if flags.random else 1 << 62  # a step without chance needs no blocks
    size, project_size = (CODED_BLOCK, CODED_BLOCK) if memory.coded else (size, BLOCK)

    @njit(**INNER)
    def run_step(addresses, strides, length, h, factor, known, at, words, kept, places, seen):
        space, bit_space, byte_space, totals = room(), bit_room(), byte_room(), nothing()
        for first in range(0, length, size):
            last, block = min(first + size, length), first // CODED_BLOCK
            place, units = kept + 4 * first, units_at(places, block)
            if kept == 0:
                place = filled(space, at + first, last - first, h, words)
            bit_place = bits_filled(bit_space, at + first, last - first, h, words)
            for i in range(first, last):
                values = scaled(load(addresses, strides, i, units), factor)
                p, state = stepped(values, h, noise(place, i - first), known)
                word = bits(bit_place, i - first)
                p = rounded(p, word)
                totals = taken_in(totals, values, p)
                if not project:
                    state = averaged(p, state, h)
                store_step(addresses, strides, i, p, state, word)
                keep(byte_space, i - first, state)
            encode(byte_space, addresses, first, last - first, places, block)
        leave(seen, totals)

    @njit(**INNER)
    def run_project(addresses, strides, length, squares, h, at, words, places):
        bit_space = bit_room()
        for first in range(0, length, project_size):
            last, units = min(first + project_size, length), units_at(places, first // CODED_BLOCK)
            bit_place = bits_filled(bit_space, at + first, last - first, h, words)
            for i in range(first, last):
                values = load(addresses, strides, i, units)
                word = bits(bit_place, i - first)
                p = rounded(projected(values[0], squares, h), word)
                store(addresses, strides, i, p, averaged(p, values[2:], h), word)

    return cast(Function, run_step), cast(Function, run_project)
