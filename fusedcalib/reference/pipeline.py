"""The step around a rule, written once: `oracle` turns a direction into one step of an optimizer."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from . import stages
from .stages import Centralize, MatrixDims, Oracle, State

Direction: TypeAlias = Callable[..., tuple[Tensor | None, State]]
"""A rule proper: ``direction(g, state, *, ...) -> (update, state)``. An update of None takes no
step: neither decay nor projection moves the weights then."""

Decay: TypeAlias = Literal["coupled", "decoupled", "proximal", "trusted"]
"""Where weight decay acts: on the gradient, on the weights before the move, or after it, or in what a
factor by norms of the whole tensor multiplies."""


class Trust(NamedTuple):
    """A factor by norms of the whole tensor: ``factor(w, g, update, state, options)``, a number.

    It multiplies the step (``scales`` is "step"), or the gradient before the rule sees it (then update and
    state are not known). The options are the rule's own, with `lr` and `weight_decay`.
    """

    factor: Callable[..., Tensor]
    scales: Literal["step", "gradient"] = "step"


def oracle(
    *, lr: float, weight_decay: float = 0.0, decay: Decay = "coupled", trust: Trust | None = None
) -> Callable[[Direction], Oracle]:
    r"""Make one step of an optimizer out of the direction of its rule.

    .. math::
        g \leftarrow P(\pm g + \lambda w + \lambda_1 \mathrm{sign}(w)), \qquad
        u = \mathrm{rule}(g), \qquad
        w \leftarrow \Pi_c\bigl((1 - \eta \lambda) w - \eta P u\bigr)

    Each of the two P and of the two decays is there only where asked for. The step has the
    arguments ``(param, grad, state, *, ...)``; besides the rule's own options these are:

    * `lr`, `weight_decay`: :math:`\eta` and :math:`\lambda`; the defaults are given here.
    * `decoupled_weight_decay`: False adds :math:`\lambda w` to the gradient, True multiplies the
      weights by :math:`1 - \eta \lambda`. Its default follows `decay`.
    * `no_prox` in the place of that, where `decay` is "proximal": False divides the weights by
      :math:`1 + \eta \lambda` after the move, True multiplies as above.
    * `maximize` (False): ascend; the gradient changes sign, the penalties do not.
    * `cautious`, `cautious_weight_decay` (False): see `stages.cautious`, `stages.cautious_decay`.
    * `l1` (0): :math:`\lambda_1`, part of the gradient for every kind of decay.
    * `centralize` (False): True or "gradient" centres what the rule is given, "update" what it
      returns; `centralize_min_ndim` (2): weights of fewer dimensions are not centred.
    * `max_row_norm` (None): the radius c of the ball the rows are projected on at last.
    * `matrix_dims` (None): which dimensions are the matrix in weights of three or more, whose rows
      are those of each matrix then.

    What the decorator makes is pure, computes in the dtype it is given, raises TypeError for an
    option it does not know and ValueError for a value of `centralize` that is not one.

    >>> import torch
    >>> @oracle(lr=0.5)
    ... def descent(g, state, *, scale=1.0):
    ...     return scale * g, {}
    >>> descent(torch.ones(1), torch.ones(1), {}, weight_decay=1.0, scale=0.5)
    (tensor([0.5000]), {})
    """
    switch = "no_prox" if decay == "proximal" else "decoupled_weight_decay"
    defaults = {"lr": lr, "weight_decay": weight_decay, switch: decay == "decoupled"}

    def decorate(direction: Direction) -> Oracle:
        named = inspect.signature(direction).parameters.values()
        own = {p.name: p.default for p in named if p.default is not p.empty}

        @functools.wraps(direction, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
        def step(param: Tensor, grad: Tensor, state: State, **options: Any) -> tuple[Tensor, State]:
            options = defaults | own | options
            kind: Decay = decay if decay in ("proximal", "trusted") else "coupled"
            kind = "decoupled" if options.pop(switch) else kind
            return _take_step(direction, (kind, trust), param, grad, state, **options)

        step.__signature__ = _signature(direction, defaults)  # type: ignore[attr-defined]
        return step

    return decorate


def _take_step(
    direction: Direction,
    around: tuple[Decay, Trust | None],
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float,
    weight_decay: float,
    maximize: bool = False,
    l1: float = 0.0,
    cautious: bool = False,
    cautious_weight_decay: bool = False,
    max_row_norm: float | None = None,
    centralize: Centralize = False,
    centralize_min_ndim: int = 2,
    matrix_dims: MatrixDims = None,
    **options: Any,
) -> tuple[Tensor, State]:
    """The stages in their order. A rule without an update only changes its state.

    Source: Yong et al. 2020, section 3.4 (decay before P); torch.optim.AdamW (decay before the
    move); Xie et al. 2022, algorithm 1 (proximal decay after it).
    """
    decay, trust = around
    g = -grad if maximize else grad
    if decay == "coupled":
        g = stages.coupled_decay(g, param, weight_decay)
    g = stages.l1_subgradient(g, param, l1)
    rows = functools.partial(stages.by_rows, matrix_dims=matrix_dims)
    centred = functools.partial(stages.centralize_at, setting=centralize, min_ndim=centralize_min_ndim)
    g = rows(functools.partial(centred, "gradient"), g)

    numbers = {**options, "lr": lr, "weight_decay": weight_decay}
    if trust and trust.scales == "gradient":
        factor = trust.factor(param, g, None, {}, numbers)
        g = factor * (g + weight_decay * param)
    update, new_state = direction(g, state, **options)
    if update is None:
        return param.clone(), new_state
    update = rows(functools.partial(centred, "update"), update)

    if cautious:
        update = stages.cautious(update, g)
    if trust and trust.scales == "step":
        if cautious_weight_decay:  # with a rate of -1: added, not taken away
            update = update + (stages.cautious_decay(param, update, -1.0, weight_decay) - param)
        else:
            update = update + weight_decay * param
        update = trust.factor(param, g, update, new_state, numbers) * update
    if decay == "decoupled":
        if cautious_weight_decay:
            param = stages.cautious_decay(param, update, lr, weight_decay)
        else:
            param = stages.decoupled_decay(param, lr, weight_decay)
    param = param - lr * update
    if decay == "proximal":
        param = stages.proximal_decay(param, lr, weight_decay)
    return rows(stages.project_rows, param, max_row_norm), new_state


def _signature(direction: Direction, defaults: dict[str, Any]) -> inspect.Signature:
    """The arguments of a step as `help` should show them: by name, the rule's own at last."""
    _, _, *around, _ = inspect.signature(_take_step).parameters.values()
    _, _, *own = inspect.signature(direction).parameters.values()
    named = {p.name: p.replace(default=defaults.get(p.name, p.default)) for p in [*around, *own]}
    for name in defaults.keys() - named.keys():
        named[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name])
    return inspect.Signature(sorted(named.values(), key=lambda p: p.kind))


def direction_of(step: Oracle) -> Direction:
    """The rule inside an oracle, for a second oracle around the same rule.

    >>> from fusedcalib.reference import sgd
    >>> import torch
    >>> direction_of(sgd)(torch.ones(1), {})
    (tensor([1.]), {})
    """
    direction: Direction = inspect.unwrap(step)
    return direction


def steps_taken(state: State) -> int:
    """Count the step being taken now, 1 at first; `state` may hold an int or a tensor.

    >>> steps_taken({}), steps_taken({"step": 1})
    (1, 2)
    """
    return int(state.get("step", 0)) + 1


def root(x: Tensor, eps: float, inside: bool) -> Tensor:
    r"""Take the root of a second moment, kept away from zero.

    .. math:: \sqrt x + \epsilon \quad \text{or, inside,} \quad \sqrt{x + \epsilon}

    The first is torch's and stops at :math:`\epsilon`, the second is the lecture's and stops at
    :math:`\sqrt\epsilon`.

    Args:
        x: second moment, any shape, after its bias correction where the rule has one.
        eps: :math:`\epsilon`; in units of the gradient outside, of its square inside.
        inside: which form.

    Source: Yao, lecture, update equations (inside) and eq. 15 (outside).

    >>> import torch
    >>> root(torch.tensor([9.0]), 7.0, inside=False), root(torch.tensor([9.0]), 7.0, inside=True)
    (tensor([10.]), tensor([4.]))
    """
    return (x + eps).sqrt() if inside else x.sqrt() + eps
