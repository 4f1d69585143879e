"""CSGD: SGD with noise on the weights of calibrated convolutions, a rule of its own for branch weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.checks import check_parameter, describe
from ..engine.slots import live_of
from ..executors.triton.resident import capturing
from ..layout.branches import SIGNS, Given
from ..layout.recipe import recipe_of
from ..noise import WeightNoise
from ..optimizer import ParamsT
from ..rules.sgd import SGD
from .branch import BranchPlan
from .calib import CalibConv2d


def csgd_groups(model: nn.Module, branch_lr: float | None = None) -> list[dict[str, Any]]:
    """Param groups of a calibrated model for `CSGD`.

    ==============  ===========================================  =======================================
    group           parameters                                   options
    ==============  ===========================================  =======================================
    "calibrated"    `weight` of every CalibConv2d                those of the optimizer, noise included
    "others"        all others                                   `noise`: None
    "branches"      `R` of every CalibConv2d                     `branch`: True, `lr`: branch_lr
    ==============  ===========================================  =======================================

    Frozen parameters are left out.

    Args:
        model: the model; parameters keep their names.
        branch_lr: learning rate of the branch weights. Default None leaves it to the optimizer's.

    Raises:
        ValueError: the model has no CalibConv2d with anything to train.

    >>> import torch, fusedcalib.nn
    >>> model = torch.nn.Sequential(fusedcalib.nn.CalibConv2d(1, 2, 3))
    >>> [(group["name"], [name for name, _ in group["params"]]) for group in csgd_groups(model)]
    [('calibrated', ['0.weight']), ('others', ['0.bias']), ('branches', ['0.R'])]
    """
    layers = [layer for layer in model.modules() if isinstance(layer, CalibConv2d)]
    weights, branches = ({getattr(layer, name) for layer in layers} for name in ("weight", "R"))
    found: dict[str, list[tuple[str, nn.Parameter]]] = {"calibrated": [], "others": [], "branches": []}
    for name, param in model.named_parameters():
        kind = "branches" if param in branches else "calibrated" if param in weights else "others"
        if param.requires_grad:
            found[kind].append((name, param))
    if not found["calibrated"] and not found["branches"]:
        raise ValueError(
            f"{type(model).__name__} has no CalibConv2d to train; fusedcalib.nn.calibrate(model) makes them"
        )
    options: dict[str, dict[str, Any]] = {
        "calibrated": {},
        "others": {"noise": None},
        "branches": {"branch": True, **({} if branch_lr is None else {"lr": branch_lr})},
    }
    return [{"name": kind, "params": params, **options[kind]} for kind, params in found.items() if params]


def _check_options(group: Mapping[str, Any]) -> None:
    """Raises where an option of branch weights is out of range."""
    if not isinstance(group["branch"], bool):
        raise ValueError(f"Invalid branch value: {group['branch']!r}, expected True or False")
    if group["branch_sign"] not in SIGNS:
        raise ValueError(f"Invalid branch_sign: {group['branch_sign']!r}, expected one of {', '.join(SIGNS)}")
    rates = {"branch_lr": group["branch_lr"]}
    if group["branch"]:
        rates["lr"] = group.get("lr", 0.0)
    for name, value in rates.items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"Invalid {name} value: {value}, expected a number >= 0")


class CSGD(SGD):
    r"""Calibrated SGD: `SGD` for weights, with noise, and a rule of its own for the branch weights R.

    .. math::
        w_t &= w_{t-1} - \gamma b_t + N(0, \sigma^2) \\
        R_k &\leftarrow |R_k - \ell\, dR_k|, \quad R_k \leftarrow R_k / \textstyle\sum_j R_j

    with :math:`b_t` as in `SGD`, both from the gradients of one backward pass. Branch weights know neither
    momentum nor decay, noise, centring, clipping or averages (`ema_decay`), whatever their group says.
    They follow the `lr` of their group, also where a scheduler changes it; where it is 0 they stay.

    Args:
        params: a calibrated model, of which `csgd_groups` makes groups; or parameters, named parameters or
            param groups, those of branch weights with the key `branch`: True.
        lr, momentum, dampening, weight_decay, nesterov: as `SGD`.
        noise: as every optimizer; of groups that say nothing else. Default `WeightNoise(1e-4)`.
        branch: whether the parameters are branch weights, [K, ...]; for param groups. Default False.
        branch_lr: learning rate :math:`\ell` of groups of branch weights that have no `lr`. Default 0.01.
        branch_sign: "descent", or "literal" for the sign that the paper prints,
            :math:`|R_k + \ell\, dR_k|`, which ascends. Default "descent".

    With `skip_nonfinite` branch weights stay where a step is left out, and those whose own gradient is not
    finite.

    State: as `SGD`; none for branch weights.

    Raises:
        ValueError: an option out of range, or a branch weight without dimensions.

    Use it: with `calibrate` or CalibConv2d; with one branch and no noise it is SGD.

    Source: Zhuo et al., "Calibrated Stochastic Gradient Descent for Convolutional Neural Networks", AAAI
    2019, Algorithm 1.

    >>> import torch, fusedcalib.nn
    >>> conv = fusedcalib.nn.CalibConv2d(1, 4, 3, branches=2)
    >>> opt = fusedcalib.nn.CSGD(conv, lr=0.1, momentum=0.9)
    >>> conv(torch.randn(8, 2, 6, 6)).square().mean().backward()
    >>> opt.step()
    >>> torch.allclose(conv.R.sum(0), torch.ones(3, 3))
    True
    """

    rule = replace(
        SGD.rule,
        extras={
            "noise": WeightNoise(1e-4),
            "branch": False,
            "branch_lr": 0.01,
            "branch_sign": "descent",
        },
        check=_check_options,
        steps=lambda group: not group["branch"],
    )
    _branches: BranchPlan | None = None

    def __init__(self, params: ParamsT | nn.Module, *args: Any, **options: Any) -> None:
        groups = csgd_groups(params) if isinstance(params, nn.Module) else params
        super().__init__(groups, *args, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer; branch weights without `lr` get `branch_lr`."""
        if isinstance(param_group, dict):
            options = {**self._extras, **param_group}
            if options["branch"] is True:
                param_group.setdefault("lr", options["branch_lr"])
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every parameter that has a gradient; returns what the closure returns. As every optimizer."""
        loss = self._evaluated(closure)
        groups = [group for group in self.param_groups if group["branch"]]
        with torch.no_grad(), self._tracking():
            branches = self._branches_of(groups)
            taken = self._engine.step(
                self.param_groups, self.state, self._scaling(), lambda: branches.prepare(self._given())
            )
            if taken:
                branches.step(groups, self._given())
        return loss

    def _branches_of(self, groups: list[dict[str, Any]]) -> BranchPlan:
        """The plan of the coming step of branch weights."""
        for group in groups:
            _check_options(group)
        branches = self._branches
        if branches is None or not branches.fits(groups):
            if capturing():
                raise RuntimeError(
                    "CSGD.step() is captured in a CUDA graph before its branch weights are ready for it; run "
                    "some steps before, on another stream, with the same gradients"
                )
            self._check_branches()
            branches = self._branches = BranchPlan(groups, self._engine.executor_of)
        if capturing() and branches not in self._engine.captured:
            self._engine.captured.append(branches)
        branches.refresh(groups)
        return branches

    def _given(self) -> Given:
        """What branch weights are told; the norm counts where steps are left out by it."""
        check = any(group["skip_nonfinite"] for group in self.param_groups)
        return Given(*self._scaling(), self.grad_norm if check else None, check)

    def _check_branches(self) -> None:
        """Raises where branch weights cannot be stepped as they are."""
        for group, index, R in live_of(self.param_groups, replace(self.rule, steps=lambda g: g["branch"])):
            owner = describe(type(self).__name__, self.param_groups, group, index)
            check_parameter(owner, R, recipe_of(self.rule, self.param_groups[group]), {})
            if R.ndim == 0 or R.is_complex():
                raise ValueError(
                    f"{owner}: branch weights are real and [K, ...], not {R.dtype} {list(R.shape)}"
                )
