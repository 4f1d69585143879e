"""What Muon cannot be asked for, said before anything is changed: what, where, and how to mend it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..engine.checks import describe
from ..hostmath import is_remote
from ..layout.shards import is_spread
from ..noise import parsed

ADJUSTMENTS = (None, "original", "match_rms_adamw")
COEFFICIENTS = ("quintic", "polar_express")
MOST_STEPS = 99  # as torch.optim.Muon


def check_options(group: Mapping[str, Any]) -> None:
    """Raises ValueError for an option of a param group that is out of range."""
    if not isinstance(group["use_muon"], bool):
        raise ValueError(f"Invalid use_muon value: {group['use_muon']!r}, expected True or False")
    if group["capturable"]:
        raise ValueError("Muon does not support capturable=True: set it to False")
    if not group["use_muon"]:
        return
    if group["cautious"]:
        raise ValueError(
            "Muon: cautious=True compares each element of an update with its gradient, which the iteration "
            "has mixed with others; set it to False in groups of matrices (cautious_weight_decay may be True)"
        )
    _check_choices(group)
    _check_iteration(group)
    random = group["stochastic_rounding"] or not isinstance(group["seed"], int)
    if parsed(group["noise"]).stage == "gradient" and random:
        raise ValueError(
            "Muon: gradient noise and stochastic_rounding in one group of matrices are not supported; set "
            "one of noise=None and stochastic_rounding=False"
        )


def _check_choices(group: Mapping[str, Any]) -> None:
    for key, known in (("adjust_lr_fn", ADJUSTMENTS), ("coefficients", COEFFICIENTS)):
        if group[key] not in known:
            raise ValueError(f"Invalid {key} value: {group[key]!r}, expected one of {known}")
    if not isinstance(group["nesterov"], bool):
        raise ValueError(f"Invalid nesterov value: {group['nesterov']!r}, expected True or False")


def _check_iteration(group: Mapping[str, Any]) -> None:
    steps, triple, eps = group["ns_steps"], group["ns_coefficients"], group["eps"]
    if type(steps) is not int or not 0 <= steps <= MOST_STEPS:
        raise ValueError(f"Invalid ns_steps value: {steps!r}, expected an int in [0, {MOST_STEPS}]")
    if not isinstance(triple, (tuple, list)) or len(triple) != 3:
        raise ValueError(f"Invalid ns_coefficients value: {triple!r}, expected three numbers")
    for key, value in (("eps", eps), *(("ns_coefficients", x) for x in triple)):
        if is_remote(value):
            raise ValueError(f"{key} lies on a device, where the host would wait for it; give a number")


def check_matrices(name: str, groups: Sequence[Mapping[str, Any]], number: int) -> None:
    """Raises ValueError where a parameter of a group that asks for Muon is no matrix, or not here whole."""
    if not groups[number]["use_muon"]:
        return
    for index, param in enumerate(groups[number]["params"]):
        owner = describe(name, groups, number, index)
        if param.ndim < 2:
            raise ValueError(
                f"{owner} has shape {list(param.shape)} and is no matrix; give it to a group with "
                "use_muon=False, as fusedcalib.muon_groups(model) does"
            )
        _check_whole(owner, param)


def _check_whole(owner: str, param: Tensor) -> None:
    if param.is_complex():
        raise ValueError(
            f"{owner} is complex, for which there is no Muon; give it to a group with use_muon=False"
        )
    if is_spread(param):
        raise ValueError(
            f"{owner} is spread over ranks (a DTensor), and a matrix is orthogonalized whole; use DDP, or "
            "give it to a group with use_muon=False"
        )
