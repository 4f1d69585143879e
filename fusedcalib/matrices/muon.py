"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalized; AdamW for what is no matrix."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from .. import hostmath
from ..engine.engine import Engine, Groups, Scaling
from ..engine.plan import Plan
from ..hostmath import Group
from ..layout.buckets import prepare
from ..optimizer import FusedOptimizer, ParamsT
from ..options import Options, check_group
from ..rule import Rule
from .batches import UPDATE, Batches
from .check import check_matrices, check_options
from .maths import along_update, momentum_or_adamw
from .views import Views

QUINTIC = (3.4445, -4.7750, 2.0315)


def _variant(group: Group) -> str:
    if not group["use_muon"]:
        return "adamw"
    return "nesterov" if group["nesterov"] else "momentum"


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    correction = 1 / hostmath.sqrt(1 - beta2**step)
    step_size = group["lr"] / (1 - beta1**step)
    return step_size, 1 - group["momentum"], 1 - beta1, beta2, 1 - beta2, correction, group["eps"]


_SECOND = Rule(
    update=along_update,
    scalars=lambda group, step: (group["lr"] * group["ratio"],),
    states={"plain": (UPDATE,)},
    counts=False,
    decay=lambda group: "decoupled",
    steps=lambda group: bool(group["use_muon"]),
)


class _First(Engine):
    """The engine of the first half, which a part of the parameters alone cannot take."""

    def check_parts(self, groups: Groups, params: Collection[Tensor]) -> None:
        """Raises: a step of some parameters has no second half."""
        raise RuntimeError(
            "Muon: gradients cannot be released, for matrices of one shape are orthogonalized together; use "
            "another optimizer, or no gradient release"
        )


class Muon(FusedOptimizer, Options):
    r"""Muon, as `torch.optim.Muon`: momentum, of which each matrix is orthogonalized before it is a step.

    .. math::
        b_t &= \mu b_{t-1} + (1 - \mu) g_t, \quad
        \tilde b_t = \mu b_t + (1 - \mu) g_t \\
        O_t &= \mathrm{NS}_k(\tilde b_t), \quad
        X \leftarrow a X + (b X X^\top + c (X X^\top)^2) X
            \;\text{ from }\; X = \tilde b_t / \max(\lVert \tilde b_t \rVert_F, \epsilon) \\
        \theta_t &= (1 - \gamma \lambda) \theta_{t-1} - \gamma\, s(\theta)\, O_t

    with :math:`s = \sqrt{\max(1, A/B)}` for a matrix [A, B], or :math:`0.2 \sqrt{\max(A, B)}`. Parameters of
    groups with `use_muon`: False are stepped as by `AdamW`, in the same `step()`.

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-3.
        weight_decay: :math:`\lambda`, per unit of learning rate. Default 0.1.
        momentum: :math:`\mu`. Default 0.95.
        nesterov: whether :math:`\tilde b_t` looks ahead; else it is :math:`b_t`. Default True.
        ns_coefficients: :math:`(a, b, c)` of every step. Default (3.4445, -4.775, 2.0315).
        eps: :math:`\epsilon`; of groups with `use_muon`: False AdamW's. Default 1e-7.
        ns_steps: :math:`k`, below 100. Default 5.
        adjust_lr_fn: :math:`s`, "original" (None) or "match_rms_adamw", with which AdamW's learning rate and
            weight decay serve. Default None.
        betas: of groups with `use_muon`: False. Default (0.9, 0.95).
        use_muon: whether the parameters are matrices to orthogonalize; for param groups, of which
            `fusedcalib.muon_groups` makes the usual ones. Default True.
        coefficients: "quintic" for `ns_coefficients`, or "polar_express" for those of Amsel et al., another
            triple each step, by which `ns_coefficients` are not used. Default "quintic".

    A parameter [out, in] is a matrix, one of three dimensions [E, out, in] are E matrices (stacked experts),
    one of four or more is a matrix with a row for each index of dimension 0 (kernels of convolutions). The
    iteration is in bf16, in batches of matrices of one shape; its workspaces are kept: bf16 like the
    parameters, and of at most 2^24 elements at once.

    In groups of matrices clipping, skipping, unscaling, `centralize="gradient"`, `l1` and gradient noise are
    of the gradient; averages, rounding, `max_row_norm`, `centralize="update"` and noise on weights of the
    step that follows the iteration.

    State: `momentum_buffer` like the parameter; `update` is a workspace, which is not saved. Of groups with
    `use_muon`: False as `AdamW`.

    Raises:
        ValueError: an option out of range; a parameter with `use_muon` of fewer than two dimensions, complex,
            or spread over ranks (DTensor).

    Use it: for the hidden matrices of transformers. An iteration costs some matrix products, which a large
    batch hides: their share of a training step falls with the tokens of a batch.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; `adjust_lr_fn`:
    Liu et al., "Muon is Scalable for LLM Training", 2025; Amsel et al., "The Polar Express", 2025.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> w.grad = torch.tensor([[4.0, 0.0], [0.0, 0.5]])
    >>> opt = fusedcalib.Muon([w], lr=1.0, ns_steps=12, coefficients="polar_express")
    >>> opt.step()  # both directions alike
    >>> [round(x, 1) for x in w.diag().tolist()]
    [-1.0, -1.0]
    """

    rule = Rule(
        update=momentum_or_adamw,
        scalars=_scalars,
        states={
            "momentum": ("momentum_buffer", UPDATE),
            "nesterov": ("momentum_buffer", UPDATE),
            "adamw": ("exp_avg", "exp_avg_sq"),
        },
        variant=_variant,
        nonnegative=frozenset({"exp_avg_sq"}),
        decay=lambda group: "decoupled",
        check=check_options,
        still=frozenset({"momentum", "nesterov"}),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        use_muon: bool = True,
        coefficients: str = "quintic",
        **options: Any,
    ) -> None:
        if options.get("offload"):
            raise ValueError("Muon does not support offload: set offload=None")
        own: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        own |= {"nesterov": nesterov, "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps}
        own |= {"adjust_lr_fn": adjust_lr_fn, "betas": betas, "use_muon": use_muon}
        super().__init__(params, {**own, "coefficients": coefficients}, **options)

    def _forget(self) -> None:
        super()._forget()
        check = partial(check_group, type(self))
        self._engine = _First(type(self).__name__, self.rule, self._backend, check, ref(self))
        self._second = Engine(type(self).__name__, _SECOND, self._backend, check, ref(self))
        self._batches = Batches()
        self._views = Views()
        self._left_out: Tensor | None = None  # not 0 where a GPU has left out the first half of a step

    def _drop_plans(self) -> None:
        super()._drop_plans()
        self._second.drop_plans()

    # -- groups and checkpoints ---------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer; parameters of a group with `use_muon` must be matrices."""
        super().add_param_group(param_group)
        try:
            check_matrices(type(self).__name__, self.param_groups, len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        found = super().__getstate__()
        kept = type(self.state)(dict)
        kept.update({param: _saved(entry) for param, entry in self.state.items()})
        return {**found, "state": kept}

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer; `update` is no part of it."""
        found = super().state_dict()
        return {**found, "state": {key: _saved(entry) for key, entry in found["state"].items()}}

    # -- the step -----------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every parameter that has a gradient; returns what the closure returns. As every optimizer."""
        loss = self._evaluated(closure)
        with torch.no_grad():
            self._step_all()
        return loss

    def _step_all(self) -> None:
        """The momentum of matrices and all of AdamW; the iteration; the step of matrices.

        Whatever can fail comes before the first launch.
        """
        if not self._views.hold(self.param_groups):
            for number in range(len(self.param_groups)):
                check_matrices(type(self).__name__, self.param_groups, number)
        first, second = self._views.of(self.param_groups)
        known = {param for param, entry in self.state.items() if UPDATE in entry}
        undo = None
        try:
            self._batches.attach([group for group in second if group["use_muon"]], self.state)
            plan = self._engine.prepare(first, self.state, self._scaling())
            undo = self._engine.undo
            scaling = self._scaling_after(plan)
            after = self._second.prepare(second, self.state, scaling)
            taken = self._engine.run(plan, self._scaling(), lambda: prepare(after.buckets))
        except BaseException:
            self._take_back(undo, known)
            raise
        if not taken:
            self._take_back(undo, known)
            return
        self._note_left_out()
        self._batches.orthogonalize()
        self._second.run(after, scaling)

    def _scaling_after(self, plan: Plan) -> Scaling:
        """By what the second half is left out where a GPU leaves out the first, unknown to the host."""
        if not (plan.needs.tentative and plan.decider.on_device):
            self._left_out = None
            return None, None
        self._before = self._engine.report.skipped()
        if self._left_out is None or self._left_out.device != self._before.device:
            self._left_out = torch.zeros((), device=self._before.device)
        return None, self._left_out

    def _note_left_out(self) -> None:
        if self._left_out is not None:
            self._left_out.copy_(self._engine.report.skipped() != self._before)

    def _take_back(self, undo: Any, known: set[Tensor]) -> None:
        """Drops what was made for a step that is not taken."""
        self._second.take_back()
        self._engine.drop_plans()
        if undo is not None:
            undo.restore()
        for param in [param for param in self.state if param not in known]:
            self.state[param].pop(UPDATE, None)
            if not self.state[param]:
                del self.state[param]


def _saved(entry: Any) -> Any:
    """The state of a parameter without its workspace."""
    if not isinstance(entry, Mapping):
        return entry
    return {key: value for key, value in entry.items() if key != UPDATE}
