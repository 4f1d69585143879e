"""The correctness gate: no speed is written of a method whose steps are not those of its rule.

Every method takes a few steps with changing gradients, and the result is held against a float64
reference, element by element, with a bound of its own, derived and not tuned:

    bound = sum over the steps of ROUNDINGS u (|p| + |change of p|)     rounding of p and of the update
          + 2 |p(g + d) - p(g)| + 2 |p(g - d) - p(g)|    p as the reference has it after the step

u is the unit roundoff of the stored type. The second line is what roundings before the update become
in it: d is ROUNDINGS u |g|, and where gradients are centred also SHIFT u max|g|, as the row's mean
is off by a few roundoffs of the gradient's size. Where the gradient is nearly nothing, m / sqrt(v)
or a sign magnifies that, up to a change of sign: so does the reference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import shapes
from .baselines import Subject
from .shapes import ParamList
from .timing import one_thread

STEPS = 3
ROUNDINGS = 8.0  # operations between load and store, each of half a unit in the last place
SHIFT = 16.0  # the same for the mean (a tree of sums) and the difference
BATCH = {"cpu": 2**18, "cuda": 2**24}  # elements that are judged at once: few enough for a cache

Oracle = Callable[..., tuple[Tensor, dict[str, Any]]]


@dataclass
class Verdict:
    """The worst element: its error, and the error as a share of its bound (passes up to 1)."""

    max_err: float = 0.0
    of_bound: float = 0.0
    reason: str | None = None  # why it could not take its steps

    @property
    def passed(self) -> bool:
        return self.reason is None and self.of_bound <= 1.0  # a NaN is not


def oracle(subject: Subject) -> Oracle:
    from fusedcalib.reference import ORACLES

    return ORACLES[subject.cls]


def check(
    spec: ParamList,
    methods: dict[str, tuple[bool, list[Tensor], Callable[[], object]]],
    subject: Subject,
    every: int = 1,
) -> dict[str, Verdict]:
    """Judge methods, given as (gc, parameters, step), freshly built on equal parameters.

    `every`: judge one row of so many.
    """
    verdicts = {name: Verdict() for name in methods}
    for step in range(STEPS):
        shapes.load_gradients(spec, [params for _, params, _ in methods.values()], step)
        for name, (_, _, take) in methods.items():
            try:
                take()
            except Exception as error:  # another library's, of any kind: it costs that method only
                verdicts[name].reason = f"{type(error).__name__}: {error}"
    able = {name: row for name, row in methods.items() if verdicts[name].reason is None}
    if able:
        some = next(iter(able.values()))[1][0]
        with one_thread():
            for batch in _batches(spec, BATCH[some.device.type]):
                _judge(spec, batch, able, subject, verdicts, some, every)
    return verdicts


def _batches(spec: ParamList, size: int) -> Iterator[list[int]]:
    """Tensors with rows of one shape, in batches: rows that are stacked step as they do alone."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(spec.shapes):
        rows = alike.setdefault((len(shape), *shape[1:]), [])
        rows.append(index)
        if sum(math.prod(spec.shapes[i]) for i in rows) > size:
            yield alike.pop((len(shape), *shape[1:]))
    yield from alike.values()


@torch.no_grad()
def _judge(
    spec: ParamList,
    batch: list[int],
    methods: dict[str, tuple[bool, list[Tensor], Callable[[], object]]],
    subject: Subject,
    verdicts: dict[str, Verdict],
    like: Tensor,
    every: int,
) -> None:
    """Hold one batch of tensors of every method against the reference, some rows at a time."""
    where = (like.device, like.dtype)
    start = torch.cat([shapes.initial(spec.shapes[i], i, *where)[::every] for i in batch])
    grads = [
        torch.cat([shapes.gradient(spec.shapes[i], i, step, *where)[::every] for i in batch])
        for step in range(STEPS)
    ]
    results = {
        name: torch.cat([params[i][::every] for i in batch]) for name, (_, params, _) in methods.items()
    }
    rows = max(1, BATCH[like.device.type] // max(1, start[0].numel()))
    for first in range(0, len(start), rows):
        piece = slice(first, first + rows)
        for gc in {gc for gc, _, _ in methods.values()}:
            wanted, bound = _expected(start[piece], [grad[piece] for grad in grads], gc, subject)
            for name in (name for name, row in methods.items() if row[0] == gc):
                error = results[name][piece].double().sub_(wanted).abs_()
                verdict = verdicts[name]
                verdict.max_err = _worse(verdict.max_err, float(error.amax()))
                verdict.of_bound = _worse(verdict.of_bound, float(error.div_(bound).amax()))


def _worse(a: float, b: float) -> float:
    return b if not b <= a else a  # a NaN wins, which it does not in max()


def _expected(start: Tensor, grads: list[Tensor], gc: bool, subject: Subject) -> tuple[Tensor, Tensor]:
    """The float64 result of the steps, and the bound of each of its elements."""
    unit = torch.finfo(start.dtype).eps / 2
    wide = [grad.double() for grad in grads]
    errors = [grad.abs().mul_(ROUNDINGS * unit) for grad in wide]
    if gc and start.ndim > 1:
        for error, grad in zip(errors, wide, strict=True):
            error += SHIFT * unit * float(grad.abs().amax())
    path = _path(start, wide, gc, subject)
    bound = torch.zeros_like(path[-1])
    for before, after in itertools.pairwise(path):
        bound += after.abs().add_((after - before).abs_()).mul_(ROUNDINGS * unit)
    for sign in (1, -1):
        nearby = [grad + sign * error for grad, error in zip(wide, errors, strict=True)]
        for near, exact in zip(_path(start, nearby, gc, subject), path, strict=True):
            bound += (near - exact).abs_().mul_(2)
    return path[-1], bound


def _path(start: Tensor, grads: list[Tensor], gc: bool, subject: Subject) -> list[Tensor]:
    """The parameters before and after each step of the reference."""
    path = [start.double()]
    state: dict[str, Any] = {}
    for grad in grads:
        param, state = oracle(subject)(path[-1], grad, state, **subject.options, centralize=gc)
        path.append(param)
    return path
