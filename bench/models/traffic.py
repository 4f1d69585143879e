"""Bytes of each parameter that a step has to move, and of each element that its kernels do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...kernels.stages import Flags

FP32 = 4  # bytes; an average is always of them
CACHED = 400e6  # bytes; a step that moves fewer finds some of them in an L2 cache of 50 MB


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
    """Bytes of each element that a kernel reads and writes."""

    read: int
    written: int
    read_again: int = 0  # which the L2 cache should still have
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


class Pass(NamedTuple):
    """One operation over all tensors: how many arrays of each kind it reads and writes."""

    params: int = 0
    grads: int = 0
    states: int = 0
    averages: int = 0
    lists: int = 0  # that a foreach launch takes; 0: a launch for each tensor
    weights: bool = False  # whether it is of weights alone

    def width(self, dtype: torch.dtype) -> int:
        """Bytes that it moves for each parameter, where states are of the parameters' type."""
        return (self.params + self.grads + self.states) * dtype.itemsize + self.averages * FP32


AROUND = {  # what users put around a step: see measure/baselines.py
    "clip": (Pass(grads=1, lists=1), Pass(grads=2, lists=1)),  # the norms; mul_
    "noise": (Pass(grads=1), Pass(grads=3)),  # randn_like; add_
    "centralize": (Pass(grads=1, weights=True), Pass(grads=2, weights=True)),  # mean; sub_
    "ema": (Pass(params=1, averages=2, lists=2),),  # lerp_
}
FOREACH_ADAMW = (
    Pass(params=2, lists=1),  # mul_ by what decay leaves
    Pass(states=2, grads=1, lists=2),  # lerp_ of the first moment
    Pass(states=2, lists=1),  # mul_ of the second
    Pass(states=2, grads=2, lists=3),  # addcmul_ of it
    Pass(states=2, lists=2),  # sqrt
    Pass(states=2, lists=1),  # div_
    Pass(states=2, lists=1),  # add_
    Pass(params=2, states=2, lists=3),  # addcdiv_
)
