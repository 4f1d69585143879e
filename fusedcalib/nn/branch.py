"""The step of the branch weights (CSGD) of all layers: one launch for each dtype."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..engine.guards import Guards
from ..executors import eager
from ..executors.branches import branch_step
from ..layout.branches import Bucket, Given, Groups, Key
from ..layout.buckets import Executor
from ..layout.shards import is_spread

EAGER: Executor = eager.EXECUTOR
__all__ = ["BranchPlan", "branch_step"]


class BranchPlan:
    """All branch weights that have a gradient, laid out once for their steps.

    Args:
        groups: the param groups of branch weights.
        executor_of: what runs a parameter.
    """

    def __init__(self, groups: Groups, executor_of: Callable[[Tensor], Executor]) -> None:
        self._guards = Guards(groups, {})
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
            read = key.executor is not EAGER
            rows = [
                [R.data_ptr(), 0, len(R), R.numel() // len(R), group] if read else [0] * 5
                for group, R in members
            ]
            table, numbers = np.array(rows, dtype=np.int64), np.zeros((2, len(groups)))
            self._buckets.append(Bucket(key, members, np.array(indices), table, numbers, capturable))

    def fits(self, groups: Groups) -> bool:
        """Whether it still fits; takes over gradients that moved."""
        return _sizes(groups) == self._sizes and self._guards.hold(groups, {})

    def refresh(self, groups: Groups) -> None:
        """Takes over gradients and options for the coming step."""
        for bucket in self._buckets:
            bucket.table[:, 1] = self._guards.grad_pointers[bucket.indices]
            bucket.key.executor.branches.refresh(bucket, groups)

    def prepare(self, given: Given) -> None:
        """Compiles all launches, so that none fails after others; of what is given only the kind matters."""
        for bucket in self._buckets:
            bucket.key.executor.branches.prepare(bucket, given.on(bucket.key.device))

    def step(self, groups: Groups, given: Given) -> None:
        """Steps all of them, without waiting for a device."""
        for bucket in self._buckets:
            bucket.key.executor.branches.step(bucket, groups, given.on(bucket.key.device))
            if bucket.key.executor is not EAGER:  # written through addresses, of which autograd is told
                torch.autograd.graph.increment_version([R for _, R in bucket.members])


def _sizes(groups: Groups) -> list[int]:
    return [len(group["params"]) for group in groups]


def _key(R: Tensor, executor: Executor) -> Key:
    """Kernels read dense tensors of one rank."""
    grad = R.grad
    assert grad is not None
    dense = not is_spread(R) and R.is_contiguous() and grad.is_contiguous()
    return Key(executor if dense else EAGER, R.device, (R.dtype, grad.dtype))
