"""Bytes of each parameter that a step has to move, and of each element that its kernels do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...kernels.stages import Flags

FP32 = 4  # bytes; an average is always of them


class Storage(NamedTuple):
    """Types of parameters, whose gradients have the same, and of states."""

    param: torch.dtype
    state: torch.dtype

    @property
    def options(self) -> dict[str, Any]:
        """What our optimizers must be told of it."""
        return {} if self.state == self.param else {"state_dtype": self.state}

    def moved(self, states: int, clips: bool = False, averages: bool = False) -> int:
        """Bytes that a step must move for each parameter.

        Parameter and states are read and written, the gradient is read, once more for its norm; an average is
        read and written.
        """
        size = self.param.itemsize
        return (3 + clips) * size + 2 * states * self.state.itemsize + 2 * FP32 * averages

    def kept(self, states: int, averages: bool = False) -> int:
        """Bytes that each parameter takes, with its gradient, states and average."""
        return 2 * self.param.itemsize + states * self.state.itemsize + FP32 * averages


DTYPES = {
    "fp32": Storage(torch.float32, torch.float32),
    "bf16": Storage(torch.bfloat16, torch.bfloat16),
    "bf16+fp32-state": Storage(torch.bfloat16, torch.float32),
}


class Traffic(NamedTuple):
    """Bytes of each element that a kernel reads and writes; `again`: what the L2 cache should still have."""

    read: int
    written: int
    read_again: int = 0
    written_again: int = 0

    @property
    def memory(self) -> int:
        """Bytes that the memory moves."""
        return self.read + self.written

    @property
    def accessed(self) -> tuple[int, int]:
        """Bytes that the kernel reads and writes, from wherever they come."""
        return self.read + self.read_again, self.written + self.written_again


def traffic(kernel: str, flags: Flags, sizes: Sequence[int], looping: bool = False) -> Traffic:
    """What a kernel moves; `sizes`: bytes of a parameter, its gradient and each state.

    Where a program walks its row again (`looping`), the mean takes what it is of and projection the new
    parameter.
    """
    param, grad, *states = sizes
    average = FP32 * flags.ema
    measured = grad + param * (flags.decay == "coupled" or flags.l1)
    if flags.centralize == "update":
        measured += sum(states) - average
    if kernel == "norm":
        return Traffic(grad, 0)
    if kernel == "sums":
        return Traffic(measured, 0)
    if kernel == "finish":
        return Traffic(param + average, param + average)
    again = looping * flags.project * (param + average)
    mean = measured * (looping and flags.centralize != "none")
    return Traffic(param + grad + sum(states), param + sum(states), mean + again, again)
