"""The param groups of Muon as the two halves of a step see them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from operator import is_
from typing import Any

from torch import Tensor

from ..noise import parsed
from .batches import matrices_in

Groups = list[dict[str, Any]]

# What is of the step after the iteration, and what is of the gradient before it.
_NOT_FIRST = {"weight_decay": 0.0, "ema_decay": 0.0, "max_row_norm": math.inf, "stochastic_rounding": False}
_NOT_SECOND = {"max_grad_norm": 0.0, "skip_nonfinite": False, "maximize": False, "l1": 0.0}
_SILENT: dict[str, Any] = {}
_RATIO = "ratio"


@cache
def ratio_of(how: str | None, rows: int, columns: int) -> float:
    """By which the learning rate of a matrix is multiplied, as torch.optim.Muon does it."""
    if how == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


class Views:
    """Groups that follow those of the optimizer; the same lists and dicts until another is added.

    The first half steps all groups, of matrices only the momentum. The second has a group for each shape of
    the matrices of a group whose learning rate is another.
    """

    def __init__(self) -> None:
        self._first: Groups = []
        self._second: Groups = []
        self._parts: list[_Parts] = []

    def hold(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the groups have the same parameters as before."""
        return len(self._parts) == len(groups) and all(
            parts.hold(group) for parts, group in zip(self._parts, groups, strict=True)
        )

    def of(self, groups: Sequence[dict[str, Any]]) -> tuple[Groups, Groups]:
        """Both, as the groups are now."""
        if not self.hold(groups):
            self._parts = [_Parts(group) for group in groups]
            self._first = [{} for _ in groups]
            self._second = [{} for parts in self._parts for _ in parts.ratios]
        second = iter(self._second)
        for group, parts, first in zip(groups, self._parts, self._first, strict=True):
            _replace(first, _of_first(group, parts) if group["use_muon"] else group)
            for ratio, own in parts.ratios.items():
                _replace(next(second), _of_second(group, own, ratio))
        return self._first, self._second


class _Parts:
    """The parameters of a group by the factor of their learning rate, with their names."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self._params, self._how = [*group["params"]], (group["adjust_lr_fn"], group["use_muon"])
        self._group, self._asked = group, group["state_dtype"]
        self.momentum = {"momentum_buffer": self._asked}  # how it is kept
        names = group.get("param_names")
        self.ratios: dict[float, dict[str, Any]] = {}
        for index, param in enumerate(self._params):
            ratio = self._ratio(param)
            part = self.ratios.setdefault(ratio, {"params": [], **({"param_names": []} if names else {})})
            part["params"].append(param)
            if names:
                part["param_names"].append(names[index])

    def _ratio(self, param: Tensor) -> float:
        how, muon = self._how
        return ratio_of(how, *matrices_in(param.shape)[1:]) if muon else 1.0

    def hold(self, group: Mapping[str, Any]) -> bool:
        """Whether they are as they were."""
        return (
            group is self._group
            and (group["adjust_lr_fn"], group["use_muon"]) == self._how
            and group["state_dtype"] is self._asked
            and len(group["params"]) == len(self._params)
            and all(map(is_, group["params"], self._params))
        )


def _of_first(group: Mapping[str, Any], parts: _Parts) -> dict[str, Any]:
    asked = group["state_dtype"]
    found = {**group, **_NOT_FIRST}
    if not isinstance(asked, Mapping) and asked != "parameter":
        found["state_dtype"] = parts.momentum
    if group["centralize"] == "update":
        found["centralize"] = False
    if parsed(group["noise"]).stage != "gradient":
        found["noise"] = _SILENT
    return found


def _of_second(group: Mapping[str, Any], own: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    found = {**group, **own, **_NOT_SECOND, "state_dtype": "parameter", _RATIO: ratio}
    if group["centralize"] != "update":
        found["centralize"] = False
    if parsed(group["noise"]).stage == "gradient":
        found["noise"] = _SILENT
    return found


def _replace(kept: dict[str, Any], now: Mapping[str, Any]) -> None:
    """Takes over what a group is now."""
    if [*kept] != [*now]:
        kept.clear()
    kept.update(now)
