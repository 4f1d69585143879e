"""What the tests of the stages around a rule have in common."""

import math

import pytest
import torch
from cases import BACKENDS, assert_near, parameters, tolerance
from rule_cases import RULES

from fusedcalib import GradientNoise

each_backend = pytest.mark.parametrize("backend", BACKENDS)
# A loop takes seconds to compile: every rule by torch's operations, some by the loops.
COMPILED = ("AdamW",)
each_run = pytest.mark.parametrize(
    ("rule", "backend"),
    [
        pytest.param(RULES[n], b, id=f"{n}-{b}")
        for b in BACKENDS
        for n in RULES
        if b == "eager" or n in COMPILED
    ],
)
# What is around a loop, and is seen in the others' on few of them.
each_rule_eager = pytest.mark.parametrize(
    ("rule", "backend"), [pytest.param(rule, "eager", id=f"{name}-eager") for name, rule in RULES.items()]
)
EVERYTHING = {
    "max_grad_norm": 1.0,
    "skip_nonfinite": True,
    "ema_decay": 0.9,
    "centralize": True,
    "noise": GradientNoise(),
}


def decided_alike(backend):
    """Options by which a GPU decides a step that the host else would: its powers have other last bits."""
    return {"capturable": True} if backend == "triton" else {}


class Pair:
    """One run under two optimizers of a rule: all in the step, and the rule after what is done by hand."""

    def __init__(self, rule, backend, options, plain=(), dtype=torch.float64):
        torch.manual_seed(0)
        self.params = parameters(dtype=dtype)
        self.others = [torch.nn.Parameter(p.detach().clone()) for p in self.params]
        own = {**rule.options, "backend": backend}
        self.ours = rule.ours(self.params, **own, **options)
        self.by_hand = rule.ours(self.others, **own, **dict(plain))

    def gradients(self, scale=1.0, spoiled=False):
        for p, q in zip(self.params, self.others, strict=True):
            p.grad = torch.randn(p.shape, dtype=torch.float64).to(p) * scale
            if spoiled and p.ndim == 2 and p.numel():
                p.grad[0, 0] = math.inf
            q.grad = p.grad.clone()

    def check(self, steps, dtype=torch.float64):
        """To rounding; identical where both do the same."""
        for p, q in zip(self.params, self.others, strict=True):
            assert_near(p, q, tolerance(dtype, steps), "parameter")
