"""The loops over a row, compiled by numba: its runs of constant stride, one after the other."""

from __future__ import annotations

from functools import cache
from typing import cast

import numpy as np
from numba import njit

from ...layout.buckets import GEOMETRY
from ...layout.recipe import Recipe
from ..source import Function
from .memory import Memory, double_at, set_number
from .noise import KEPT, noise_maker
from .norms import factor_of
from .runs import ADD_FREELY, NAMES, passes_of, row_average
from .values import INNER


def row_loop(recipe: Recipe, memory: Memory, scaled: Function, part: str) -> Function:
    """A row's part of a step: "sums" returns its sum, "finish" shortens it if it must be.

    "squares" adds those of which its rule wants the norms to the sums of its tile.

    "step" does all of it; "partial" takes its mean from the row's total and leaves its squares there.
    """
    norms, total, next_total, squares, step, project = passes_of(recipe, memory, scaled)
    real, flags, split = memory.real, recipe.flags, part in ("partial", "partial squares")
    trust_of, late = factor_of(recipe, memory, NAMES), flags.centres_trusted
    means, keeps, projects, ema = flags.means, flags.row_state, flags.project, flags.ema
    factor_at, row_averaged = memory.factor_at, row_average()
    centres_gradient, centres_update = flags.centralize == "gradient", flags.centralize == "update"
    room, filled, _ = noise_maker(flags.noise, real)
    twice = means and flags.noise == "gradient" and not split  # the sum wants the noise, and the step
    start_of_run = _run_starter(memory)

    @njit(**INNER)
    def sum_row(row, addresses, strides, runs, length, h, factor, at, words, about, kept):
        found, places, trust = 0.0, about[2], real(1.0)
        if late:
            trust = trust_of(about[3], h)
        for run in range(runs):
            start = start_of_run(row, addresses, run)
            begin = at + run * length
            found += total(start, strides, length, h, factor, begin, words, (kept, places), trust)
        return found

    @njit(**INNER)
    def next_mean(row, addresses, strides, runs, length, h, factor, at, words, about, known):
        found, beside, first = 0.0, (known[0], about[2]), known[1]
        for run in range(runs):
            start = start_of_run(row, addresses, run)
            begin = at + run * length
            found += next_total(start, strides, length, h, factor, begin, words, beside, first)
        return real(found / (runs * length))

    @njit(**INNER)
    def finish_row(row, addresses, strides, runs, length, h, at, words, found, places):
        if ema or np.sqrt(real(found)) > h.longest:
            for run in range(runs):
                start = start_of_run(row, addresses, run)
                project(start, strides, length, real(found), h, at + run * length, words, places)

    @njit(**INNER)
    def mean_of(row, addresses, strides, runs, length, h, factor, at, words, about, kept):
        mean = real(0.0)
        if means and split:
            mean = real(double_at(about[0])[0] / about[1])
        elif means:
            found = sum_row(row, addresses, strides, runs, length, h, factor, at, words, about, kept)
            mean = real(found / (runs * length))
        return mean

    @njit(**INNER)
    def norms_row(row, addresses, strides, runs, length, h, factor, at, words, about):
        mean = real(0.0)
        if not late:
            mean = mean_of(row, addresses, strides, runs, length, h, factor, at, words, about, 0)
        known = mean, real(1.0), real(0.0)
        for run in range(runs):
            start = start_of_run(row, addresses, run)
            norms(start, strides, length, h, factor, known, at + run * length, words, about[2], about[3])
        return 0.0

    @njit(**INNER)
    def step_row(row, addresses, strides, runs, length, h, factor, at, words, about):
        kept, places, trust = 0, about[2], trust_of(about[3], h)
        if twice and runs == 1 and length <= KEPT:
            kept = filled(room(), at, length, h, words)
        mean = mean_of(row, addresses, strides, runs, length, h, factor, at, words, about, kept)
        state = real(0.0)
        if keeps:
            first, mean = mean, real(0.0)
            if centres_gradient:
                mean = first
                known = (kept, first)
                first = next_mean(row, addresses, strides, runs, length, h, factor, at, words, about, known)
            state = row_averaged(factor_at(about[4], about[5])[0], first, h)
            set_number(about[4], about[5], state)
            if centres_update:
                known = (kept, state)
                mean = next_mean(row, addresses, strides, runs, length, h, factor, at, words, about, known)
        of_row = mean, trust, state
        for run in range(runs):
            start = start_of_run(row, addresses, run)
            step(start, strides, length, h, factor, of_row, at + run * length, words, kept, places, about[6])
        found = 0.0
        if projects:
            for run in range(runs):
                found += squares(start_of_run(row, addresses, run), strides, length, places)
            if not split:
                finish_row(row, addresses, strides, runs, length, h, at, words, found, places)
        return found

    @njit(**INNER)
    def sums(row, addresses, strides, runs, length, h, factor, at, words, about):
        return sum_row(row, addresses, strides, runs, length, h, factor, at, words, about, 0)

    @njit(**INNER)
    def finish(row, addresses, strides, runs, length, h, factor, at, words, about):
        finish_row(row, addresses, strides, runs, length, h, at, words, double_at(about[0])[0], about[2])
        return 0.0

    found = {"sums": sums, "finish": finish, "squares": norms_row, "partial squares": norms_row}
    return cast(Function, found.get(part, step_row))


@cache
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
    load, units_at = memory.storage.load, memory.storage.units
    start_of_run = _run_starter(memory)

    @njit(**INNER, fastmath=ADD_FREELY)
    def run_squares(addresses, strides, length, factor, places):
        total, units = 0.0, units_at(places, 0)  # of no use to a gradient
        for i in range(length):
            g = np.float64(scaled(load(addresses, strides, i, units), factor)[1])
            total += g * g
        return total

    @njit(**INNER)
    def squares(row, addresses, strides, runs, length, h, factor, at, words, about):
        total = 0.0
        for run in range(runs):
            total += run_squares(start_of_run(row, addresses, run), strides, length, factor, about[2])
        return total

    return cast(Function, squares)


@cache
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
