"""Bytes of each parameter that a step has to move, and of each element that its kernels do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ...kernels.stages import Flags
from ...kernels.storage import BLOCK, CODED

FP32 = 4  # bytes; an average is always of them, and a scale
BESIDE = {None: 0, "split16": 2, "split8": 1, "float32": FP32}  # bytes beside a parameter
CACHED = 400e6  # bytes; a step that moves fewer finds some of them in an L2 cache of 50 MB


class Storage(NamedTuple):
    """Types of parameters, whose gradients have the same, and of states; what is kept beside a parameter."""

    param: torch.dtype
    state: torch.dtype | str  # or a name of fusedcalib.storage.FORMS
    master: str | None = None
    stochastic: bool = False  # whether parameters are rounded at random
    block: int = BLOCK  # elements that share a scale of 4 bytes, where states are kept in bytes

    @property
    def options(self) -> dict[str, Any]:
        """What our optimizers must be told of it."""
        told: dict[str, Any] = {} if self.state == self.param else {"state_dtype": self.state}
        if self.master is not None:
            told["master_weights"] = self.master
        return told | ({"stochastic_rounding": True} if self.stochastic else {})

    @property
    def coded(self) -> bool:
        """Whether states are kept in bytes, with scales: they are coarser than any dtype."""
        return self.state == "8bit"

    @property
    def packed(self) -> bool:
        """Whether something is kept as no torch.optim class keeps it."""
        return self.coded or self.master is not None or isinstance(self.state, str)

    @property
    def rounds(self) -> bool:
        """Whether rounding at random does something to parameters."""
        return self.param != torch.float32 and self.master not in ("split16", "float32")

    @property
    def plain(self) -> Storage:
        """What others make of such parameters: states of the same type."""
        return Storage(self.param, self.param)

    @property
    def state_size(self) -> float:
        """Bytes of an element of a state, its share in a scale among them."""
        if isinstance(self.state, torch.dtype):
            return self.state.itemsize
        return 1 + FP32 / self.block if self.coded else 2

    def moved(
        self, states: int, clips: bool = False, averages: bool = False, looked: Sequence[str] = ()
    ) -> float:
        """Bytes that a step must move for each parameter.

        Parameter and states are read and written, the gradient is read, once more for its norm; an average is
        read and written. What is beside a parameter is too; an fp32 copy is read in place of it. For norms of
        whole tensors what is `looked` at ("param", "grad", names of states) is read once before.
        """
        size, beside = self.param.itemsize, BESIDE[self.master]
        weights = 2 * (size + beside) - size * (self.master == "float32")
        seen = {"param": beside if self.master == "float32" else size + beside, "grad": size}
        before = sum(seen.get(name, self.state_size) for name in looked)
        return weights + (1 + clips) * size + 2 * states * self.state_size + 2 * FP32 * averages + before

    def kept(self, states: int, averages: bool = False) -> float:
        """Bytes that each parameter takes, with its gradient, states and average."""
        return 2 * self.param.itemsize + BESIDE[self.master] + states * self.state_size + FP32 * averages


DTYPES = {
    "fp32": Storage(torch.float32, torch.float32),
    "bf16": Storage(torch.bfloat16, torch.bfloat16),
    "bf16+fp32-state": Storage(torch.bfloat16, torch.float32),
    "split16": Storage(torch.bfloat16, torch.float32, "split16"),
    "split16+bf16-state": Storage(torch.bfloat16, "bfloat16_stochastic", "split16"),
    "split16+8bit": Storage(torch.bfloat16, "8bit", "split16"),
    "split8+8bit": Storage(torch.bfloat16, "8bit", "split8"),
    "bf16+8bit": Storage(torch.bfloat16, "8bit", stochastic=True),
    "fp32+8bit": Storage(torch.float32, "8bit"),
}
PUBLISHED = {  # what other libraries keep of AdamW, as they say: scales of 256, or fp16 ones of 32, elements
    "bitsandbytes, torchao: 8-bit AdamW": Storage(torch.bfloat16, "8bit", block=256),
    "FlashOptim, 24-bit weights": Storage(torch.bfloat16, "8bit", "split8"),
    "TransformerEngine, apex: fp32 copy": Storage(torch.bfloat16, torch.float32, "float32"),
}


class Traffic(NamedTuple):
    """Bytes of each element that a kernel reads and writes; the fractions are scales."""

    read: float
    written: float
    read_again: float = 0  # which the L2 cache should still have
    written_again: float = 0

    @property
    def memory(self) -> float:
        """Bytes that the memory moves."""
        return self.read + self.written

    @property
    def accessed(self) -> tuple[int, int]:
        """Bytes of elements that the kernel reads and writes, from wherever they come."""
        return int(self.read + self.read_again), int(self.written + self.written_again)


def sizes_of(dtypes: Iterable[int], kept: Sequence[str], scales: float = FP32 / BLOCK) -> list[float]:
    """Bytes of an element of each tensor of a slot, with its share in scales where it is kept in bytes.

    `dtypes`: bytes of what lies there; `kept`: kinds as in kernels/storage.py, () where all are cast.
    """
    coded = [kind in CODED for kind in kept]
    return [size + scales if i < len(coded) and coded[i] else size for i, size in enumerate(dtypes)]


def traffic(kernel: str, flags: Flags, sizes: Sequence[float], looping: bool = False) -> Traffic:
    """What a kernel moves; `sizes`: bytes of a parameter, its gradient, each state, what is beside it.

    Where a program walks its row again (`looping`), the mean takes what it is of and projection the new
    parameter.
    """
    param, grad, *states = sizes
    beside = states.pop() if flags.master != "none" else 0
    average = FP32 * flags.ema
    weight = param + beside
    seen = beside if flags.master == "float32" else weight
    measured = grad + seen * (flags.decay == "coupled" or flags.l1)
    if flags.centralize == "update":
        measured += sum(states) - average
    if kernel == "norm":
        return Traffic(grad, 0)
    if kernel == "sums":
        return Traffic(measured, 0)
    if kernel == "totals":
        return Traffic(0, 0)
    if kernel == "squares":  # at most: rules that look at one state only read less
        looked = sum(states) - average if flags.trust == "step" else 0
        return Traffic(seen + grad + looked, 0)
    if kernel == "finish":
        return Traffic(seen + average, weight + average)
    projected = looping * flags.project
    mean = measured * (looping and flags.centralize != "none")
    read_again = mean + projected * (seen + average)
    return Traffic(
        seen + grad + sum(states), weight + sum(states), read_again, projected * (weight + average)
    )


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
