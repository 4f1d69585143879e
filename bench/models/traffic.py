"""Bytes of each element that the kernels of a step have to move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...kernels.stages import Flags

FP32 = 4  # bytes; an average is always of them


def step_bytes(param: int, grad: int, states: Iterable[int]) -> int:
    """Bytes that a step must move for one parameter, from the bytes of each value.

    Parameter and states are read and written, the gradient is read.
    """
    return 2 * param + grad + 2 * sum(states)


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
