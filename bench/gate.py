"""The correctness gate: no speed is written of a method whose steps are not those of AdamW.

Every method takes a few steps with changing gradients, and every element of the result is held
against a float64 reference with a bound of its own, derived and not tuned:

    bound = sum over the steps of
              ROUNDINGS u (|p| + lr)                         rounding of p and of the update
            + lr min(2, SHIFT u max|g| / sqrt(v_hat))        only where gradients are centred

u is the unit roundoff of the stored type. The second part is what centring costs: the row's mean
is off by a few roundoffs of the gradient's size, and where the centred gradient is nearly nothing,
m / sqrt(v) magnifies that, up to a change of sign, which is 2 lr.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import shapes
from .shapes import ParamList
from .timing import one_thread

STEPS = 3
ROUNDINGS = 8.0  # operations between load and store, each of half a unit in the last place
SHIFT = 16.0  # the same for the mean (a tree of sums) and the difference
LARGEST_UPDATE = 2.0  # of lr: a changed sign
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


def oracle() -> Oracle:
    from fusedcalib.reference import adamw

    return adamw


def check(
    spec: ParamList,
    methods: dict[str, tuple[bool, list[Tensor], Callable[[], object]]],
    hyper: dict[str, Any],
) -> dict[str, Verdict]:
    """Judge methods, given as (gc, parameters, step), freshly built on equal parameters."""
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
                _judge(spec, batch, able, hyper, verdicts, some)
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
    hyper: dict[str, Any],
    verdicts: dict[str, Verdict],
    like: Tensor,
) -> None:
    """Hold one batch of tensors of every method against the reference, some rows at a time."""
    where = (like.device, like.dtype)
    start = torch.cat([shapes.initial(spec.shapes[i], i, *where) for i in batch])
    grads = [
        torch.cat([shapes.gradient(spec.shapes[i], i, step, *where) for i in batch]) for step in range(STEPS)
    ]
    results = {name: torch.cat([params[i] for i in batch]) for name, (_, params, _) in methods.items()}
    rows = max(1, BATCH[like.device.type] // max(1, start[0].numel()))
    for first in range(0, len(start), rows):
        piece = slice(first, first + rows)
        for gc in {gc for gc, _, _ in methods.values()}:
            wanted, bound = _expected(start[piece], [grad[piece] for grad in grads], gc, hyper)
            for name in (name for name, row in methods.items() if row[0] == gc):
                error = results[name][piece].double().sub_(wanted).abs_()
                verdict = verdicts[name]
                verdict.max_err = _worse(verdict.max_err, float(error.amax()))
                verdict.of_bound = _worse(verdict.of_bound, float(error.div_(bound).amax()))


def _worse(a: float, b: float) -> float:
    return b if not b <= a else a  # a NaN wins, which it does not in max()


def _expected(start: Tensor, grads: list[Tensor], gc: bool, hyper: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The float64 result of the steps, and the bound of each of its elements."""
    unit = torch.finfo(start.dtype).eps / 2
    lr, beta2, eps = hyper["lr"], hyper["betas"][1], hyper["eps"]
    param = start.double()
    bound = torch.zeros_like(param)
    state: dict[str, Any] = {}
    for step, grad in enumerate(grads, start=1):
        param, state = oracle()(param, grad.double(), state, **hyper, centralize=gc)
        bound += param.abs().add_(lr).mul_(ROUNDINGS * unit)
        if gc and param.ndim > 1:
            root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(eps)
            shift = root.reciprocal_().mul_(SHIFT * unit * float(grad.abs().amax()))
            bound += shift.clamp_(max=LARGEST_UPDATE).mul_(lr)
    return param, bound
