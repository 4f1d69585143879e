"""What type checkers and editors read of radam.py. Made by docs/build.py; do not edit."""

from typing import Any, Literal

import torch
from torch import Tensor

from ..noise import GradientNoise, LangevinNoise, WeightNoise
from ..optimizer import FusedOptimizer, ParamsT

class RAdam(FusedOptimizer, torch.optim.RAdam):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-08,
        weight_decay: float | Tensor = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        centralize: bool | Literal["gradient", "update"] = False,
        centralize_min_ndim: int = 2,
        matrix_dims: tuple[int, int] | None = None,
        cautious: bool = False,
        cautious_weight_decay: bool = False,
        l1: float | Tensor = 0.0,
        max_row_norm: float | Tensor | None = None,
        noise: GradientNoise | WeightNoise | LangevinNoise | dict[str, Any] | None = None,
        seed: int = 0,
        max_grad_norm: float | Tensor | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | Tensor | None = None,
        stochastic_rounding: bool = False,
        state_dtype: torch.dtype | str | dict[str, Any] | None = None,
        master_weights: bool | int | Literal["split16", "split8", "float32"] | None = None,
        min_8bit_size: int = 4096,
        fused: bool | None = False,
        backend: Literal["auto", "triton", "numba", "eager"] = "auto",
        offload: Literal["states"] | None = None,
    ) -> None:
        r"""RAdam, as `torch.optim.RAdam`: Adam that waits until its second moment can be trusted.

        Args:
            params: parameters, named parameters or param groups, as torch.optim takes them.
            lr: learning rate `\gamma`, a number or 0-dim tensor. Default 1e-3.
            betas: decay rates `(\beta_1, \beta_2)`. Default (0.9, 0.999).
            eps: `\epsilon`, in units of the gradient. Default 1e-8.
            weight_decay: decay, added to the gradient. Default 0.
            decoupled_weight_decay: decay the parameter, not the gradient. Default False.
            foreach: accepted for compatibility. Default None.
            maximize: ascend, not descend: the gradient changes sign, penalties do not. Default False.
            capturable: count steps and compute the numbers of a step on the GPU, so that it can be captured
                in a CUDA graph; a replay reads a learning rate (or other hyperparameter) that is a GPU tensor
                anew. Default False.
            differentiable: must be False. Default False.
            centralize: remove the mean of each row from the gradient (True or "gradient") or from the update
                ("update"); tensors of one dimension and rows of one element stay as they are. Default False.
            centralize_min_ndim: centre tensors of at least this many dimensions; 4 means convolutions only.
                Default 2.
            matrix_dims: with (-2, -1) parameters of three dimensions or more are stacks of matrices, as
                weights of experts [experts, out, in]: a row, to be centred, shortened or kept in bytes, is
                one of each matrix. Default None: a row is one index of dimension 0.
            cautious: leave elements of the update out whose sign is not the gradient's, as the rule is given
                it: they do not move in that step, while states go on. Default False.
            cautious_weight_decay: decay only elements whose update does not point away from zero, `u \theta
                \ge 0`; where decay is decoupled. Default False.
            l1: L1 penalty `\lambda_1`, added to the gradient times the sign of the parameter (0 at 0), in
                units of the gradient; with `weight_decay` the elastic net. Default 0.
            max_row_norm: largest Euclidean norm `c` of a row after a step, in units of the parameter, for
                tensors of two dimensions or more; longer rows are scaled down. Default None: no limit.
            noise: `fusedcalib.GradientNoise`, `WeightNoise` or `LangevinNoise`, Gaussian noise on the
                gradient before centring or on the parameter after the step; as a dict in param groups.
                Default None.
            seed: of noise and stochastic rounding, an int of 64 bits. Default 0.
            max_grad_norm: largest Euclidean norm of all gradients together, in units of the gradient: they
                are scaled down to it as by `torch.nn.utils.clip_grad_norm_`, but in the step, without
                changing `p.grad`. Default None: no limit.
            skip_nonfinite: leave a step out whose gradients are not all finite: parameters, state and
                counters stay; `skipped_steps` counts. Default False.
            ema_decay: `\beta` of an exponential moving average of the parameter, `\bar\theta \leftarrow \beta
                \bar\theta + (1 - \beta) \theta`, in [0, 1), from the parameter before the first step on; in
                fp32, as the state `ema`. Default None: no average.
            stochastic_rounding: round bf16 parameters to one of their two neighbours at random, such that the
                mean is right, by `seed`; parameters of 32 and more bits are not affected. Default False.
            state_dtype: of the states that are like the parameter: torch.float32, bfloat16, float16 or
                float64; kept by load_state_dict. Default None: the parameter's, as torch.optim.
            master_weights: what bf16 parameters have beside them, so that small steps are not lost: "split16"
                (True, 32) 16 bits more, which make them fp32 to the last bit; "split8" (24) 8 bits more;
                "float32" a copy, also of fp16 parameters. Default None: nothing.
            min_8bit_size: elements of a parameter, from which on `state_dtype="8bit"` keeps bytes; smaller
                ones have fp32 states. Default 4096.
            fused: with True the step also unscales for a `torch.amp.GradScaler`, and leaves itself out where
                a gradient is not finite, without rewriting gradients or waiting for the device. Default None.
            backend: "auto", "triton", "numba" or "eager"; for the whole optimizer. Default "auto".
            offload: "states" keeps states, and what parameters have beside them, in pinned host memory, where
                the kernels of a GPU read and write them; for the whole optimizer, on GPUs that Triton steps.
                Default None: on the device of the parameters.
        """
