"""The correctness gate: no speed is written of a method whose steps are not those of its rule.

Every method takes a few steps with changing gradients, and the result is held against a float64
reference, element by element, with a bound of its own, derived and not tuned:

    bound = sum over the steps of ROUNDINGS u (|p| + |change of p|)     rounding of p and of the update
          + 2 |p(g + d) - p(g)| + 2 |p(g - d) - p(g)|    p as the reference has it after the step

u is the unit roundoff of the stored type. The second line is what roundings before the update become
in it: d is ROUNDINGS u |g|, and where gradients are centred also SHIFT u max|g|, as the row's mean
is off by a few roundoffs of the gradient's size. Where the gradient is nearly nothing, m / sqrt(v)
or a sign magnifies that, up to a change of sign: so does the reference.

A method that makes the numbers of its step in fp32 (compiled by torch, it does) is allowed for each beta
(t + 2) u |change of p| / (1 - beta^t) more in step t: beta is rounded, raised to a power and taken from 1.

A method that keeps its states in bytes is allowed what its format is off by (FORMATS): the reference's
states are moved by as much after each step, outwards or inwards, in every combination of those, and twice the
most that p is then off by is added.
Weights that are kept in more bits than u's are judged as what the model sees, which is rounded once.

Gradients that are clipped are so in the reference, by the float64 norm of all. What is made of
torch.nn.utils.clip_grad_norm_ is judged with torch's own norm, which is far off on long lists (2e-4 of
12M elements in one tensor). An average has a bound of its own: the share of the parameters' bounds that
goes into it, and ROUNDINGS u |average| for each step.

Noise is left out of these steps: its variance is set to 0. What that hides is seen by spare.py.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models import shapes
from ..models.shapes import ParamList
from .formats import FORMATS, NONNEGATIVE, Format
from .method import NONE, Extras, Subject
from .rivals import sentence
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
    seconds: float = 0.0  # that its steps took, compiling among them

    @property
    def passed(self) -> bool:
        return self.reason is None and self.of_bound <= 1.0  # a NaN is not

    @property
    def fault(self) -> str | None:
        """Why it does not pass, if it does not."""
        wrong = f"wrong result: {self.of_bound:.3g} times the bound away from float64"
        return None if self.passed else self.reason or wrong


class Kind(NamedTuple):
    """What the reference and its bound depend on."""

    extras: Extras = NONE
    torch_norm: bool = False  # clips by the norm that torch finds
    narrow: bool = False  # makes the numbers of its step in fp32
    form: str = ""  # of FORMATS, if its states are kept in bytes


class Entry(NamedTuple):
    """A method to be judged, freshly built."""

    kind: Kind
    params: list[Tensor]
    step: Callable[[], object]
    averages: Callable[[], list[Tensor]] | None = None


def oracle(subject: Subject) -> Oracle:
    from fusedcalib.reference import ORACLES

    return ORACLES[subject.cls]


def check(spec: ParamList, methods: dict[str, Entry], subject: Subject, every: int = 1) -> dict[str, Verdict]:
    """Judge methods, freshly built on equal parameters.

    `every`: judge one row of so many.
    """
    verdicts = {name: Verdict() for name in methods}
    factors: dict[Kind, list[float]] = {row.kind: [] for row in methods.values()}
    for step in range(STEPS):
        shapes.load_gradients(spec, [row.params for row in methods.values()], step)
        for kind, of_steps in factors.items():
            of_steps.append(_factor(kind.extras, kind.torch_norm, next(iter(methods.values())).params))
        for name, row in methods.items():
            if verdicts[name].reason is None:
                _take(row, verdicts[name])
    able = {name: row for name, row in methods.items() if verdicts[name].reason is None}
    if able:
        with one_thread():
            size = BATCH[next(iter(able.values())).params[0].device.type]
            if subject.looked():  # by norms of whole tensors: one at a time, all its rows
                size, every = 0, 1
            for batch in _batches(spec, size):
                _judge(spec, batch, able, subject, verdicts, factors, every)
    return verdicts


def _take(row: Entry, verdict: Verdict) -> None:
    start = time.perf_counter()
    try:
        row.step()
    except Exception as error:  # another library's, of any kind: it costs that method only
        verdict.reason = sentence(error)
    verdict.seconds += time.perf_counter() - start


@torch.no_grad()
def _factor(extras: Extras, torch_norm: bool, params: list[Tensor]) -> float:
    """What clipping scales the gradients by, as torch.nn.utils.clip_grad_norm_ does."""
    if extras.clip is None:
        return 1.0
    grads = [param.grad for param in params if param.grad is not None]
    if torch_norm:
        norm = float(torch.nn.utils.get_total_norm(grads, foreach=True))
    else:
        norm = math.sqrt(sum(float(grad.double().square_().sum()) for grad in grads))
    return min(1.0, extras.clip / (norm + 1e-6))


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
    methods: dict[str, Entry],
    subject: Subject,
    verdicts: dict[str, Verdict],
    factors: dict[Kind, list[float]],
    every: int,
) -> None:
    """Hold one batch of tensors of every method against the reference, some rows at a time."""
    like = next(iter(methods.values())).params[0]
    where = (like.device, like.dtype)
    start = torch.cat([shapes.initial(spec.shapes[i], i, *where)[::every] for i in batch])
    grads = [
        torch.cat([shapes.gradient(spec.shapes[i], i, step, *where)[::every] for i in batch])
        for step in range(STEPS)
    ]
    results: dict[str, list[Tensor]] = {}
    for name, row in methods.items():
        of_method = [row.params, row.averages()] if row.averages else [row.params]
        results[name] = [torch.cat([values[i][::every] for i in batch]) for values in of_method]
    rows = max(1, BATCH[like.device.type] // max(1, start[0].numel()))
    rows = len(start) if subject.looked() else rows
    for first in range(0, len(start), rows):
        piece = slice(first, first + rows)
        for kind in {row.kind for row in methods.values()}:
            wide = [g[piece].double().mul_(f) for g, f in zip(grads, factors[kind], strict=True)]
            expected = _expected(start[piece], wide, kind, subject)
            for name in (name for name, row in methods.items() if row.kind == kind):
                verdict = verdicts[name]
                if len(results[name]) != len(expected):
                    verdict.reason = "no average of the parameters"
                    continue
                for result, (wanted, bound) in zip(results[name], expected, strict=True):
                    error = result[piece].double().sub_(wanted).abs_()
                    verdict.max_err = _worse(verdict.max_err, float(error.amax()))
                    verdict.of_bound = _worse(verdict.of_bound, float((error / bound).amax()))


def _worse(a: float, b: float) -> float:
    return b if not b <= a else a  # a NaN wins, which it does not in max()


def _expected(start: Tensor, wide: list[Tensor], kind: Kind, subject: Subject) -> list[tuple[Tensor, Tensor]]:
    """The float64 result of the steps and the bound of each of its elements; the same of an average."""
    unit = torch.finfo(start.dtype).eps / 2
    errors = [grad.abs().mul_(ROUNDINGS * unit) for grad in wide]
    if kind.extras.gc and start.ndim > 1:
        for error, grad in zip(errors, wide, strict=True):
            error += SHIFT * unit * float(grad.abs().amax())
    path = _path(start, wide, kind.extras.gc, subject)
    bounds = [torch.zeros_like(path[0])]
    for step, (before, after) in enumerate(itertools.pairwise(path), start=1):
        change = (after - before).abs_()
        rounded = after.abs().add_(change).mul_(ROUNDINGS * unit)
        bounds.append(bounds[-1] + rounded + change.mul_(_narrowness(subject, step) if kind.narrow else 0.0))
    for sign in (1, -1):
        near = torch.zeros_like(path[0])
        nearby = [grad + sign * error for grad, error in zip(wide, errors, strict=True)]
        for other, exact, bound in zip(
            _path(start, nearby, kind.extras.gc, subject), path, bounds, strict=True
        ):
            near += (other - exact).abs_().mul_(2)
            bound += near
    if kind.form:
        _allow(FORMATS[kind.form], start, wide, kind.extras.gc, subject, path, bounds)
    return [
        (path[-1], bounds[-1]),
        *([] if kind.extras.ema is None else [_average(path, bounds, kind.extras.ema)]),
    ]


def _allow(
    form: Format,
    start: Tensor,
    wide: list[Tensor],
    gc: bool,
    subject: Subject,
    path: list[Tensor],
    bounds: list[Tensor],
) -> None:
    """Adds to the bounds what states in bytes may be off by: rules are monotone in each of them."""
    worst = [torch.zeros_like(bound) for bound in bounds]
    for signs in itertools.product((1, -1), repeat=2 * (STEPS - 1)):
        moved = _path(start, wide, gc, subject, (form, signs))
        for most, other, exact in zip(worst, moved, path, strict=True):
            torch.maximum(most, (other - exact).abs_(), out=most)
    for bound, most in zip(bounds, worst, strict=True):
        bound += most.mul_(2)


def _narrowness(subject: Subject, step: int) -> float:
    """The relative error of an update whose bias corrections were made in fp32."""
    unit = torch.finfo(torch.float32).eps / 2
    betas: tuple[float, ...] = subject.rule_options().get("betas", ())
    return sum((step + 2) * unit / (1 - beta**step) for beta in betas if beta)


def _average(path: list[Tensor], bounds: list[Tensor], decay: float) -> tuple[Tensor, Tensor]:
    """The average over a path of parameters, and its bound."""
    average, bound = path[0].clone(), torch.zeros_like(path[0])
    for param, of_param in zip(path[1:], bounds[1:], strict=True):
        average.lerp_(param, 1 - decay)
        bound.mul_(decay).add_(of_param, alpha=1 - decay)
        bound.add_(average.abs(), alpha=ROUNDINGS * torch.finfo(torch.float32).eps / 2)
    return average, bound


def _path(
    start: Tensor,
    grads: list[Tensor],
    gc: bool,
    subject: Subject,
    off: tuple[Format, Sequence[int]] | None = None,
) -> list[Tensor]:
    """The parameters before and after each step of the reference; `off`: where its states then go."""
    path = [start.double()]
    state: dict[str, Any] = {}
    for step, grad in enumerate(grads):
        param, state = oracle(subject)(path[-1], grad, state, **subject.options, centralize=gc)
        path.append(param)
        if off is not None and step < len(grads) - 1:
            form, signs = off
            like = [name for name, x in state.items() if isinstance(x, Tensor) and x.shape == start.shape]
            for name in like:
                state[name] = form.off(state[name], name, signs[2 * step + (name in NONNEGATIVE)])
    return path
