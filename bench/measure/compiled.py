"""torch.compile of AdamW with gradient centralization, as a user might write it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from .timing import Step

WHOLE_LIST = 200  # tensors; above it one graph of the whole list takes minutes to compile


def build(params: list[Tensor], hyper: dict[str, Any]) -> tuple[Step, str]:
    """A compiled step on these parameters, and a note: how it was compiled.

    The bias corrections are tensors on the device, so that no step compiles anew.
    """
    grads = [param.grad for param in params]
    exp_avgs = [torch.zeros_like(param) for param in params]
    exp_avg_sqs = [torch.zeros_like(param) for param in params]
    corrections = [torch.ones((), device=params[0].device) for _ in range(2)]
    taken = 0
    lr, (beta1, beta2) = hyper["lr"], hyper["betas"]
    eps, decay = hyper["eps"], hyper["weight_decay"]

    def update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, c1: Tensor, c2: Tensor) -> None:
        if g.ndim > 1:
            g = g - g.mean(dim=tuple(range(1, g.ndim)), keepdim=True)
        m.lerp_(g, 1 - beta1)
        v.lerp_(g * g, 1 - beta2)
        p.copy_(p * (1 - lr * decay) - lr * (m / c1) / ((v / c2).sqrt() + eps))

    def update_all(c1: Tensor, c2: Tensor) -> None:
        for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
            assert g is not None
            update(p, g, m, v, c1, c2)

    whole = len(params) <= WHOLE_LIST
    # One graph for each shape; the default limit would fall back to eager without a word.
    torch._dynamo.config.recompile_limit = 1000
    one: Any = torch.compile(update, fullgraph=True, dynamic=False)
    every: Any = torch.compile(update_all, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step() -> None:
        nonlocal taken
        taken += 1
        for correction, beta in zip(corrections, (beta1, beta2), strict=True):
            correction.fill_(1 - beta**taken)  # in double: 1 - 0.999 loses four digits in fp32
        if whole:
            every(*corrections)
        else:
            for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
                one(p, g, m, v, *corrections)

    saved = [param.detach().clone() for param in params]
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    with torch.no_grad():  # as if that first step had not been
        for param, value in zip(params, saved, strict=True):
            param.copy_(value)
        torch._foreach_zero_([*exp_avgs, *exp_avg_sqs])
    taken = 0
    return step, f"{'whole list' if whole else 'tensor by tensor'}, compiled in {seconds:.0f} s"
