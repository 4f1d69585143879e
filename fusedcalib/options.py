"""Every option that all optimizers share: its default, what None means, its check, how groups keep it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from .hostmath import is_on, is_remote
from .noise import GradientNoise, LangevinNoise, WeightNoise, as_dict, parsed
from .option import MATRIX_DIMS, Option
from .ranges import check_ranges
from .storage import FORMATS, MASTERS, check_storage, format_name, is_format, is_master

CENTRALIZE = (False, True, "gradient", "update")
Backend = Literal["auto", "triton", "numba", "eager"]  # executors/ has the last three, here by preference
BACKENDS: tuple[str, ...] = get_args(Backend)


def _number(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check of a number, which nobody can look at where it lies on a device."""
    return lambda value: is_remote(value) or fits(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


# Arguments of torch.optim's classes; `fused` and `capturable` are also taken where torch's class does not.
FLAGS = (
    Option("maximize", False, bool, "ascend, not descend: the gradient changes sign, penalties do not."),
    Option("foreach", None, bool | None, "accepted for compatibility."),
    Option(
        "fused",
        None,
        bool | None,
        "with True the step also unscales for a `torch.amp.GradScaler`, and leaves itself out where a "
        "gradient is not finite, without rewriting gradients or waiting for the device. Every step is one "
        "fused pass.",
    ),
    Option(
        "capturable",
        False,
        bool,
        "count steps and compute the numbers of a step on the GPU, so that it can be captured in a CUDA "
        "graph; a replay reads a learning rate (or other hyperparameter) that is a GPU tensor anew.",
    ),
    Option("differentiable", False, bool, "must be False."),
)
# What torch.optim does not know, in the order that signatures and param groups have.
OURS = (
    Option(
        "centralize",
        False,
        bool | Literal["gradient", "update"],
        'remove the mean of each row from the gradient (True or "gradient") or from the update '
        '("update"); tensors of one dimension and rows of one element stay as they are.',
        lambda value: value in CENTRALIZE,
        f"one of {CENTRALIZE}",
    ),
    Option(
        "centralize_min_ndim",
        2,
        int,
        "centre tensors of at least this many dimensions; 4 means convolutions only.",
        lambda value: type(value) is int and value >= 1,
        "an int >= 1",
    ),
    Option(
        "matrix_dims",
        None,
        tuple[int, int] | None,
        "with (-2, -1) parameters of three dimensions or more are stacks of matrices, as weights of experts "
        "[experts, out, in]: a row, to be centred, shortened or kept in bytes, is one of each matrix.",
        *MATRIX_DIMS,
    ),
    Option(
        "cautious",
        False,
        bool,
        "leave elements of the update out whose sign is not the gradient's, as the rule is given it: they do "
        "not move in that step, while states go on. Others are not scaled up.",
        _is_bool,
        "True or False",
    ),
    Option(
        "cautious_weight_decay",
        False,
        bool,
        r"decay only elements whose update does not point away from zero, :math:`u \theta \ge 0`; where "
        "decay is decoupled.",
        _is_bool,
        "True or False",
    ),
    Option(
        "l1",
        0.0,
        float | Tensor,
        r"L1 penalty :math:`\lambda_1`, added to the gradient times the sign of the parameter (0 at 0), in "
        "units of the gradient; with `weight_decay` the elastic net.",
        _number(lambda value: 0 <= value < math.inf),
        "a finite number >= 0",
    ),
    Option(
        "max_row_norm",
        None,
        float | Tensor | None,
        "largest Euclidean norm :math:`c` of a row after a step, in units of the parameter, for tensors "
        "of two dimensions or more; longer rows are scaled down.",
        _number(lambda value: value > 0),
        "a number > 0, or None for no limit",
        none=math.inf,
        means="no limit",
    ),
    Option(
        "noise",
        None,
        GradientNoise | WeightNoise | LangevinNoise | dict[str, Any] | None,
        "`fusedcalib.GradientNoise`, `WeightNoise` or `LangevinNoise`, Gaussian noise on the gradient "
        "before centring or on the parameter after the step; as a dict in param groups.",
        lambda value: bool(parsed(value)),  # which says itself what is wrong
        stored=as_dict,
    ),
    Option(
        "seed",
        0,
        int,
        "of noise and stochastic rounding, an int of 64 bits. They are the same whatever the device, the "
        "order of the parameters or how they are grouped, and go on where a checkpoint left them. A "
        "parameter's follow its name, where parameters are named, else its place among all.",
        lambda value: type(value) is int and 0 <= value < 2**64,
        "an int in [0, 2^64)",
    ),
    Option(
        "max_grad_norm",
        None,
        float | Tensor | None,
        "largest Euclidean norm of all gradients together, in units of the gradient: they are scaled down "
        "to it as by `torch.nn.utils.clip_grad_norm_`, but in the step, without changing `p.grad`. The "
        "norm is of all groups; a group may have a limit of its own. `grad_norm` is the norm; `math.inf` "
        "only measures it.",
        _number(lambda value: value >= 0),
        "a number > 0, or None for no limit",
        none=0.0,
        means="no limit",
    ),
    Option(
        "skip_nonfinite",
        False,
        bool,
        "leave a step out whose gradients are not all finite: parameters, state and counters stay; "
        "`skipped_steps` counts. For all groups if for one.",
        _is_bool,
        "True or False",
    ),
    Option(
        "ema_decay",
        None,
        float | Tensor | None,
        r":math:`\beta` of an exponential moving average of the parameter, :math:`\bar\theta \leftarrow "
        r"\beta \bar\theta + (1 - \beta) \theta`, in [0, 1), from the parameter before the first step on; "
        "in fp32, as the state `ema`. `ema_weights()` swaps it in.",
        _number(lambda value: 0 <= value < 1),
        "a number in (0, 1) or None",
        none=0.0,
        means="no average",
    ),
    Option(
        "stochastic_rounding",
        False,
        bool,
        "round bf16 parameters to one of their two neighbours at random, such that the mean is right, by "
        "`seed`; parameters of 32 and more bits are not affected.",
        _is_bool,
        "True or False",
    ),
    Option(
        "state_dtype",
        None,
        torch.dtype | str | dict[str, Any] | None,
        "of the states that are like the parameter: torch.float32, bfloat16, float16 or float64; kept by "
        'load_state_dict. "8bit" keeps a byte an element and a scale for each 64 of a row, in parameters of '
        'two dimensions that are not small; "bfloat16_stochastic" rounds second moments at random. A dict '
        "says it for each state by its name.",
        is_format,
        FORMATS,
        none="parameter",
        means="the parameter's, as torch.optim",
        stored=format_name,
    ),
    Option(
        "master_weights",
        None,
        bool | int | Literal["split16", "split8", "float32"] | None,
        'what bf16 parameters have beside them, so that small steps are not lost: "split16" (True, 32) 16 '
        'bits more, which make them fp32 to the last bit; "split8" (24) 8 bits more; "float32" a copy, also '
        "of fp16 parameters. Parameters of 32 and more bits are not affected.",
        is_master,
        'None, "split16", "split8" or "float32"',
        none="none",
        means="nothing",
        stored=lambda value: MASTERS[value] if is_master(value) else value,
    ),
    Option(
        "min_8bit_size",
        4096,
        int,
        'elements of a parameter, from which on `state_dtype="8bit"` keeps bytes; smaller ones have fp32 '
        "states.",
        lambda value: type(value) is int and value >= 0,
        "an int >= 0",
    ),
)
BACKEND = Option(
    "backend",
    "auto",
    Backend,
    '"auto", "triton", "numba" or "eager"; for the whole optimizer.',
    lambda value: value in BACKENDS,
    f"one of {', '.join(BACKENDS)}",
    called="backend",
)
OFFLOAD = Option(
    "offload",
    None,
    Literal["states"] | None,
    '"states" keeps states, and what parameters have beside them, in pinned host memory, where the kernels '
    "of a GPU read and write them; for the whole optimizer, on GPUs that Triton steps.",
    lambda value: value == "states",
    '"states" or None',
    means="on the device of the parameters",
)
WHOLE = (BACKEND, OFFLOAD)  # of the whole optimizer, in no param group
SHARED = (*FLAGS, *OURS, *WHOLE)
EXTRAS: dict[str, Any] = {option.name: option.default for option in OURS}
# What None stands for in param groups, also in an option that one rule has.
NONE_IS = {option.name: option.none for option in OURS if option.none is not None} | {
    "clip_exponent": math.inf,
    "alpha_warmup": 0.0,
    "beta3_warmup": 0.0,
}


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as param groups hold them: numbers, strings and dicts, so that they can be saved."""
    found = {k: NONE_IS[k] if v is None and k in NONE_IS else v for k, v in options.items()}
    return found | {option.name: option.stored(found[option.name]) for option in OURS if option.name in found}


def check_group(cls: type[Any], group: Mapping[str, Any]) -> None:
    """Raises ValueError for an option of a param group that is out of range or not supported by a class."""
    for option in OURS:
        option.check(group[option.name])
    check_storage(cls, group)
    if OFFLOAD.name in group:
        raise ValueError(
            f"{cls.__name__}: a param group has offload, which is of the whole optimizer; give it to the "
            "constructor instead"
        )
    if group.get("differentiable"):
        other = f"use torch.optim.{cls.__name__}(differentiable=True)"
        instead = other if hasattr(torch.optim, cls.__name__) else "set it to False"
        raise ValueError(f"{cls.__name__} does not support differentiable=True; {instead}")
    if issubclass(cls, Options):  # torch.optim's own classes check what they are constructed with
        check_ranges(group, cls)
    if group["cautious_weight_decay"] and is_on(group["weight_decay"]):
        kind, trust = cls.rule.decay(group), cls.rule.trust
        if kind not in ("decoupled", "trusted") or (trust and trust.scales == "gradient"):
            raise ValueError(
                f"{cls.__name__}: cautious_weight_decay=True needs decoupled weight decay, and here it is "
                "part of the gradient or comes after the step; use a class with decoupled decay, as AdamW, "
                "or cautious_weight_decay=False"
            )
    cls.rule.check(group)


class Options(Optimizer):
    """In the place of torch.optim's class for optimizers that it does not have: checks and keeps options."""

    def __init__(
        self,
        params: Any,
        own: dict[str, Any],
        /,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        check_ranges(own, type(self))
        flags = {"foreach": foreach, "maximize": maximize, "capturable": capturable}
        flags |= {"differentiable": differentiable, "fused": fused}
        super().__init__(params, {**plain(own), **flags})
