"""The rule of branch weights (CSGD), and the step of those of all layers: one launch for each dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.guards import Guards
from ..layout.branches import SIGNS, Bucket, Given, Groups, Key
from ..layout.buckets import Executor
from ..layout.shards import is_spread
from .calib import normalized


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


class BranchPlan:
    """All branch weights that have a gradient, laid out once for their steps.

    Args:
        groups: the param groups of branch weights.
        executor_of: what runs a parameter.
    """

    def __init__(self, groups: Groups, executor_of: Callable[[Tensor], Executor]) -> None:
        self._watch = Guards(groups, {})
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
        for bucket in self._buckets:
            bucket.table[:, 1] = self._watch.grad_pointers[bucket.indices]
            _module(bucket).refresh(bucket, groups)

    def prepare(self, given: Given) -> None:
        """Compiles all launches, so that none fails after others; of what is given only the kind matters."""
        for bucket in self._buckets:
            _module(bucket).prepare(bucket, given.on(bucket.key.device))

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
        from ..executors.triton import branches as branch_gpu

        return branch_gpu
    if bucket.key.executor == "numba":
        from ..executors.numba import branches as branch_cpu

        return branch_cpu
    return Eager


class Eager:
    """Plain torch, one branch weight after the other."""

    @staticmethod
    def refresh(bucket: Bucket, groups: Groups) -> None:
        """Gradients and options are read when they are needed."""

    @staticmethod
    def prepare(bucket: Bucket, given: Given) -> None:
        """There is nothing to make ready."""

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
