"""What is compiled to be looked at: every rule in its variants and storage, for every row class."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch

import fusedcalib
from fusedcalib.kernels import spec

F32, BF16 = torch.float32, torch.bfloat16


class Config(NamedTuple):
    """A parameter to be stepped; options as an optimizer takes them, hashable."""

    rule: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32)  # parameter, gradient, state
    options: tuple[tuple[str, Any], ...] = ()
    # How the parameter lies in memory: "" | "unaligned" | "transposed" | "permuted", or "ranks": its columns
    # are an eighth of all, or "factors": there is one for each row of the gradient.
    slicing: str = ""


class Kind(NamedTuple):
    """A rule, its variant, and how parameter, gradient and state are stored."""

    rule: str
    variant: str = "plain"
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32)

    @property
    def tensors(self) -> int:
        """Of a slot: parameter, gradient and the states that the rule declares."""
        return 2 + len(getattr(fusedcalib, self.rule).rule.states[self.variant])


# Options that lead to a variant of that name; none where it is the default.
CHOSEN: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "amsgrad": {"amsgrad": True},
    "centered": {"centered": True},
    "centered momentum": {"centered": True, "momentum": 0.9},
    "Signum plain": {"momentum": 0.0},
}
IN_FP32 = {
    f"{rule} {variant}": Kind(rule, variant)
    for rule, cls in fusedcalib.optimizers().items()
    for variant in cls.rule.states
}
KINDS = IN_FP32 | {
    "AdamW bf16, fp32 state": Kind("AdamW", "plain", (BF16, BF16, F32)),
    "AdamW bf16": Kind("AdamW", "plain", (BF16,) * 3),
    "SGD bf16": Kind("SGD", "plain", (BF16,) * 3),
    "Lion bf16": Kind("Lion", "plain", (BF16,) * 3),
}
CENTRED = {"centralize": True}
ALL_STAGES = {"l1": 0.1, "weight_decay": 0.1, "centralize": True, "max_row_norm": 1.0}
# A parameter of each row class, and what is asked for of its rows.
CLASSES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "flat": ((4096,), {}),
    **{f"rows of {n}": ((8, n), CENTRED) for n in (64, 256, 1024, 4096)},
    "longest rows": ((8, 8192), CENTRED),
    "longest rows, all stages": ((8, 8192), ALL_STAGES),
    "loop": ((8, 32768), CENTRED),
    "loop, all stages": ((8, 32768), ALL_STAGES),
    "pieces": ((2, 40000), CENTRED),
}


def slow_unless(often: Callable[..., bool], cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Cases for parametrize: each compiles for half a second, so those that say least are marked "slow"."""
    marks = pytest.mark.slow
    return [case if often(*case) else pytest.param(*case, marks=marks) for case in cases]


def config(kind: str, row_class: str = "flat", **options: Any) -> Config:
    k = KINDS[kind]
    shape, stages = CLASSES[row_class]
    if row_class.startswith("longest") and k.tensors * shape[-1] > spec.HELD:
        shape = (8, 4096)
    chosen = CHOSEN.get(f"{k.rule} {k.variant}", CHOSEN.get(k.variant, {}))
    return Config(k.rule, shape, k.dtypes, (*({**stages, **chosen, **options}).items(),))
