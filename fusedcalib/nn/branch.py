"""The rule of branch weights (CSGD), and the step of those of all layers: one launch for each dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..distributed import is_spread
from ..mirror import Array
from ..numbers import number_of
from ..tables import Executor
from ..watch import Watch
from .calib import normalized

SIGNS = {"descent": -1.0, "literal": 1.0}
Groups = Sequence[dict[str, Any]]


def branch_step(R: Tensor, grad: Tensor, lr: float | Tensor, sign: str = "descent") -> Tensor:
    r"""Branch weights after a step.

    .. math:: R_k \leftarrow |R_k - \ell\, dR_k|, \qquad R_k \leftarrow R_k / \textstyle\sum_j R_j

    and 1/K each where all are 0. With sign "literal" :math:`|R_k + \ell\, dR_k|`, as the paper
    prints it: that ascends where dR is the gradient of a loss.

    Args:
        R: branch weights [K, ...].
        grad: gradient of the loss with respect to them, like R.
        lr: :math:`\ell`, a number or 0-dim tensor.
        sign: "descent" or "literal". Default "descent".

    Raises:
        ValueError: the sign is neither.

    Source: Zhuo et al., "Calibrated Stochastic Gradient Descent for Convolutional Neural Networks", AAAI
    2019, Algorithm 1, lines 7 and 8.

    >>> import torch
    >>> branch_step(torch.tensor([0.5, 0.5]), torch.tensor([1.0, -1.0]), lr=0.25)
    tensor([0.2500, 0.7500])
    """
    if sign not in SIGNS:
        raise ValueError(f"Invalid branch_sign: {sign!r}, expected one of {', '.join(SIGNS)}")
    return normalized((R + SIGNS[sign] * lr * grad).abs())


class Given(NamedTuple):
    """What a step is told besides the options of its groups.

    Attributes:
        scale: by what the gradients are too large, if they are.
        found_inf: not 0 where a gradient is not finite: then all branch weights stay.
        norm: of all other gradients, where it counts: all stay where it is not finite.
        check: whether those stay whose own step is not finite.
    """

    scale: Tensor | None = None
    found_inf: Tensor | None = None
    norm: Tensor | None = None
    check: bool = False

    def on(self, device: torch.device) -> Given:
        """The same, there."""
        there = [t if t is None else t.to(device, non_blocking=True) for t in self[:3]]
        return Given(there[0], there[1], there[2], self.check)


class Key(NamedTuple):
    """What branch weights of one launch have in common."""

    executor: str
    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype]  # of R and its gradient


@dataclass(eq=False)
class Bucket:
    """One launch.

    Attributes:
        members: (place of its group among those of branch weights, branch weight).
        indices: the place of each among all branch weights with a gradient.
        table: int64 [branch weights, 5], as kernels/branch.py reads it.
        numbers: fp64 [2, groups], likewise.
        cache: the executor's own.
    """

    key: Key
    members: list[tuple[int, Tensor]]
    indices: Array
    table: Array
    numbers: Array
    capturable: bool = False
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def compute(self) -> torch.dtype:
        """Arithmetic is in fp32, in fp64 for fp64 branch weights."""
        return torch.promote_types(self.key.dtypes[0], torch.float32)

    def take_numbers(self, groups: Groups, lr_of: Callable[[Any], float] = number_of) -> None:
        """Takes over learning rates and signs."""
        for i, group in enumerate(groups):
            sign = SIGNS[group["branch_sign"]]
            self.numbers[:, i] = lr_of(group["lr"]), -sign if group["maximize"] else sign


class BranchPlan:
    """All branch weights that have a gradient, laid out once for their steps.

    Args:
        groups: the param groups of branch weights.
        executor_of: what runs a parameter.
    """

    def __init__(self, groups: Groups, executor_of: Callable[[Tensor], Executor]) -> None:
        self._watch = Watch(groups, {})
        self._sizes = _sizes(groups)
        live = [(i, p) for i, group in enumerate(groups) for p in group["params"] if p.grad is not None]
        places: dict[Key, list[int]] = {}
        for index, (_, R) in enumerate(live):
            if R.numel():
                places.setdefault(_key(R, executor_of(R)), []).append(index)
        capturable = any(group.get("capturable") for group in groups)
        self._buckets = []
        for key, indices in places.items():
            members = [live[i] for i in indices]
            rows = [
                [R.data_ptr(), 0, len(R), R.numel() // len(R), group] if key.executor != "eager" else [0] * 5
                for group, R in members
            ]
            table, numbers = np.array(rows, dtype=np.int64), np.zeros((2, len(groups)))
            self._buckets.append(Bucket(key, members, np.array(indices), table, numbers, capturable))

    def holds(self, groups: Groups) -> bool:
        """Whether it still fits; takes over gradients that moved."""
        return _sizes(groups) == self._sizes and self._watch.holds(groups, {})

    def refresh(self, groups: Groups) -> None:
        """Takes over gradients and options for the coming step."""
        addresses = np.array(self._watch.grad_pointers, dtype=np.int64)
        for bucket in self._buckets:
            bucket.table[:, 1] = addresses[bucket.indices]
            _module(bucket).refresh(bucket, groups)

    def run(self, groups: Groups, given: Given) -> None:
        """Steps all of them, without waiting for a device."""
        for bucket in self._buckets:
            _module(bucket).run(bucket, groups, given.on(bucket.key.device))
            if bucket.key.executor != "eager":  # written through addresses, of which autograd is told
                torch.autograd.graph.increment_version([R for _, R in bucket.members])


def _sizes(groups: Groups) -> list[int]:
    return [len(group["params"]) for group in groups]


def _key(R: Tensor, executor: Executor) -> Key:
    """Kernels read dense tensors of one rank."""
    grad = R.grad
    assert grad is not None
    dense = not is_spread(R) and R.is_contiguous() and grad.is_contiguous()
    return Key(executor.name if dense else "eager", R.device, (R.dtype, grad.dtype))


def _module(bucket: Bucket) -> Any:
    """What runs it, imported where it is needed."""
    if bucket.key.executor == "triton":
        from . import branch_gpu

        return branch_gpu
    if bucket.key.executor == "numba":
        from . import branch_cpu

        return branch_cpu
    return Eager


class Eager:
    """Plain torch, one branch weight after the other."""

    @staticmethod
    def refresh(bucket: Bucket, groups: Groups) -> None:
        """Gradients and options are read when they are needed."""

    @staticmethod
    def run(bucket: Bucket, groups: Groups, given: Given) -> None:
        for group, R in bucket.members:
            _step(R, groups[group], given)


def _step(R: Tensor, group: dict[str, Any], given: Given) -> None:
    assert R.grad is not None
    lr: float | Tensor = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = lr.item()
    if not isinstance(lr, Tensor) and lr == 0:
        return
    compute = torch.promote_types(R.dtype, torch.float32)
    grad = R.grad.to(compute)
    if given.scale is not None:
        grad = grad / given.scale
    new = branch_step(R.to(compute), -grad if group["maximize"] else grad, lr, group["branch_sign"])
    stays = [lr == 0] if isinstance(lr, Tensor) else []
    if given.found_inf is not None:
        stays.append(given.found_inf != 0)
    if given.norm is not None:
        stays.append(~given.norm.isfinite())
    if given.check:
        stays.append(~new.isfinite().all())
    for condition in stays:
        new = torch.where(condition, R.to(compute), new)
    R.copy_(new)
