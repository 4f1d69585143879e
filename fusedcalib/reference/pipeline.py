"""The step around a rule, written once: `oracle` turns a direction into one step of an optimizer."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from torch import Tensor

from . import stages
from .stages import Centralize, Oracle, State

Direction: TypeAlias = Callable[..., tuple[Tensor | None, State]]
"""A rule proper: ``direction(g, state, *, ...) -> (update, state)``, an update of None: stay."""

Decay: TypeAlias = Literal["coupled", "decoupled", "proximal"]
"""Where weight decay acts: on the gradient, on the weights before the move, or after it."""


def oracle(
    *, lr: float, weight_decay: float = 0.0, decay: Decay = "coupled"
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
    * `l1` (0): :math:`\lambda_1`, part of the gradient for every kind of decay.
    * `centralize` (False): True or "gradient" centres what the rule is given, "update" what it
      returns; `centralize_min_ndim` (2): weights of fewer dimensions are not centred.
    * `max_row_norm` (None): the radius c of the ball the rows are projected on at last.

    A rule that returns None as its update takes no step: its state changes, the weights do not,
    whatever the decay and the projection.

    Args:
        lr: default of the learning rate.
        weight_decay: default of the decay.
        decay: where it acts by default.

    Returns:
        A decorator. What it makes is pure, computes in the dtype it is given, raises TypeError for
        an option it does not know and ValueError for a value of `centralize` that is not one.

    Source: Yong et al. 2020, section 3.4 (decay before P); torch.optim.AdamW (decay before step).

    >>> import torch
    >>> @oracle(lr=0.5)
    ... def descent(g, state, *, scale=1.0):
    ...     return scale * g, {}
    >>> descent(torch.ones(1), torch.ones(1), {}, weight_decay=1.0, scale=0.5)
    (tensor([0.5000]), {})
    """
    switch = "no_prox" if decay == "proximal" else "decoupled_weight_decay"
    default_lr, default_decay = lr, weight_decay

    def decorate(direction: Direction) -> Oracle:
        @functools.wraps(direction, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
        def step(
            param: Tensor,
            grad: Tensor,
            state: State,
            *,
            lr: float = default_lr,
            weight_decay: float = default_decay,
            maximize: bool = False,
            l1: float = 0.0,
            max_row_norm: float | None = None,
            centralize: Centralize = False,
            centralize_min_ndim: int = 2,
            **options: Any,
        ) -> tuple[Tensor, State]:
            decoupled = options.pop(switch, decay == "decoupled")
            kind = "decoupled" if decoupled else "proximal" if decay == "proximal" else "coupled"

            g = -grad if maximize else grad
            g = stages.coupled_decay(g, param, weight_decay if kind == "coupled" else 0)
            g = stages.l1_subgradient(g, param, l1)
            g = stages.centralize_at("gradient", g, centralize, centralize_min_ndim)
            update, new_state = direction(g, state, **options)
            if update is None:
                return param.clone(), new_state
            update = stages.centralize_at("update", update, centralize, centralize_min_ndim)
            param = stages.decoupled_decay(param, lr, weight_decay if kind == "decoupled" else 0)
            param = param - lr * update
            param = stages.proximal_decay(param, lr, weight_decay if kind == "proximal" else 0)
            return stages.project_rows(param, max_row_norm), new_state

        step.__signature__ = _signature(step, switch, decay, direction)  # type: ignore[attr-defined]
        return step

    return decorate


def _signature(step: Oracle, switch: str, decay: Decay, direction: Direction) -> inspect.Signature:
    """The arguments of `step` as `help` should show them: those of the rule by name."""
    *around, _ = inspect.signature(step, follow_wrapped=False).parameters.values()
    _, _, *own = inspect.signature(direction).parameters.values()
    choice = inspect.Parameter(switch, inspect.Parameter.KEYWORD_ONLY, default=decay == "decoupled")
    options = sorted([*around, choice, *own], key=lambda p: p.kind)
    return inspect.Signature(options, return_annotation=tuple[Tensor, State])


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
