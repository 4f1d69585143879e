"""What a step of branch weights is told, and its launches as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..hostmath import number_of
from .buckets import Array, Executor

SIGNS = {"descent": -1.0, "literal": 1.0}
Groups = Sequence[dict[str, Any]]


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

    executor: Executor
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


class BranchExecutor(Protocol):
    """Steps the branch weights of a bucket."""

    def refresh(self, bucket: Bucket, groups: Groups) -> None:
        """Takes over gradients and options for the coming step."""

    def prepare(self, bucket: Bucket, given: Given) -> None:
        """Gets the launch ready; of what is given only the kind matters."""

    def step(self, bucket: Bucket, groups: Groups, given: Given) -> None:
        """Steps all of them, without waiting for a device."""
