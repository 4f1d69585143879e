"""The optimizers under test: one line each, and what judges it: torch.optim's class or the oracle."""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import fusedcalib
from fusedcalib.reference import ORACLES

# Options of every param group that torch.optim does not know, as a group stores their defaults.
OWN = {
    "centralize": False,
    "centralize_min_ndim": 2,
    "matrix_dims": (),
    "cautious": False,
    "cautious_weight_decay": False,
    "l1": 0.0,
    "max_row_norm": math.inf,
}
# What the oracles know nothing of, as param groups hold it.
AROUND = {
    "noise": {},
    "seed": 0,
    "max_grad_norm": 0.0,
    "skip_nonfinite": False,
    "ema_decay": 0.0,
    "stochastic_rounding": False,
    "state_dtype": "parameter",
    "master_weights": "none",
    "min_8bit_size": 4096,
}
OWN |= AROUND


@dataclass(frozen=True)
class Rule:
    """One optimizer class, an ordinary run's options, and the state that torch makes for them."""

    name: str
    options: dict[str, Any]
    moments: tuple[str, ...]
    counted: bool = True
    of_rows: tuple[str, ...] = ()  # states of a number for each row
    signs: bool = False  # it moves by signs: what is left of a gradient near zero is not its size

    @functools.cached_property
    def ours(self) -> type[torch.optim.Optimizer]:
        return getattr(fusedcalib, self.name)

    @property
    def in_torch(self) -> bool:
        return hasattr(torch.optim, self.name)

    @property
    def theirs(self) -> type[torch.optim.Optimizer]:
        """torch.optim's class of that name, or one made of the oracle where there is none."""
        if self.name == "Adagrad":
            return late_adagrad()
        return getattr(torch.optim, self.name, None) or oracle_optimizer(self.name)

    def takes(self, *options: str) -> bool:
        """Whether torch's class has all these arguments; ours, where torch has no such class."""
        cls = self.theirs if self.in_torch else self.ours
        return set(options) <= inspect.signature(cls).parameters.keys()

    @property
    def own(self) -> dict[str, Any]:
        """What a param group has that torch.optim does not know, and its default."""
        flags = {"fused": False, "capturable": False}  # all of ours take them
        return OWN | dict(self.ours.rule.extras) | {k: v for k, v in flags.items() if not self.takes(k)}

    def new_state(self, p: torch.Tensor, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """State as it is before the first step."""
        start = self.options.get("initial_accumulator_value", 0.0)
        state = {key: torch.full_like(p, start, dtype=dtype).detach() for key in self.moments}
        wide = torch.promote_types(p.dtype, torch.float32)
        rows = p.shape[0] if p.ndim > 1 else 1
        state |= {key: torch.zeros(rows, dtype=wide, device=p.device) for key in self.of_rows}
        product = {"mu_product": torch.ones(())} if self.name == "NAdam" else {}
        return {"step": torch.zeros(()), **product, **state} if self.counted else state


DECAY = {"lr": 0.02, "weight_decay": 0.1}
BETAS = {**DECAY, "betas": (0.8, 0.95)}
ADAM = {**BETAS, "eps": 1e-3}  # with less, a gradient that cancels out to 1e-8 moves by its own rounding
MOMENTUM = {**DECAY, "momentum": 0.9}
BOTH = ("exp_avg", "exp_avg_sq")
RULES = {
    rule.name: rule
    for rule in (
        Rule("SGD", {**MOMENTUM, "lr": 0.1}, ("momentum_buffer",), False),
        Rule("SGDW", MOMENTUM, ("momentum_buffer",), False),
        Rule("Adam", ADAM, BOTH),
        Rule("AdamW", ADAM, BOTH),
        # an initial value that every dtype holds
        Rule("Adagrad", {**DECAY, "initial_accumulator_value": 0.125}, ("sum",)),
        Rule("Adadelta", {**DECAY, "lr": 1.0, "eps": 1e-3}, ("square_avg", "acc_delta")),
        Rule("RMSprop", {**MOMENTUM, "alpha": 0.9, "eps": 0.1}, ("square_avg", "momentum_buffer")),
        Rule("Adamax", ADAM, ("exp_avg", "exp_inf")),
        Rule("NAdam", ADAM, BOTH),
        Rule("RAdam", ADAM, BOTH),
        Rule("Lion", {**BETAS, "lr": 0.01}, ("exp_avg",), False, signs=True),
        Rule("Signum", MOMENTUM, ("momentum_buffer",), False, signs=True),
        Rule(
            "Adan",
            {**ADAM, "betas": (0.8, 0.7, 0.95)},
            ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad"),
        ),
        Rule("ADOPT", {**ADAM, "eps": 0.1}, BOTH),
        Rule(
            "AdEMAMix",
            {**ADAM, "betas": (0.8, 0.95, 0.98), "alpha_warmup": 4.0, "beta3_warmup": 3.0},
            ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"),
        ),
        Rule("AdaBelief", ADAM, ("exp_avg", "exp_avg_var")),
        Rule("LaProp", ADAM, BOTH),
        Rule("LAMB", ADAM, BOTH),
        Rule("LARS", {**MOMENTUM, "lr": 1.0, "trust_coeff": 0.1}, ("momentum_buffer",), False),
        Rule("StableAdamW", ADAM, BOTH),
        Rule("AdamMini", ADAM, ("exp_avg",), of_rows=("exp_avg_sq",)),
    )
}
IN_TORCH = [name for name, rule in RULES.items() if rule.in_torch]
COUNTED = [name for name, rule in RULES.items() if rule.counted]
# One of every kind, for tests that multiply: nothing counted, decoupled decay, an initial value, a
# product, no torch class and a sign, a first step that moves nothing.
FEW = ["SGD", "AdamW", "Adagrad", "NAdam", "Lion", "ADOPT"]


def each(names: Any) -> pytest.MarkDecorator:
    """A test for these rules only, in the place of the fixture `rule`."""
    return pytest.mark.parametrize("rule", [RULES[name] for name in names], ids=list(names))


each_few = each(FEW)


@functools.cache
def late_adagrad() -> type[torch.optim.Optimizer]:
    """torch.optim.Adagrad; where it has no state for a parameter that comes late, one that makes it."""
    p = torch.nn.Parameter(torch.zeros(1))
    p.grad = torch.zeros(1)
    found = torch.optim.Adagrad([p])
    found.state.clear()
    try:
        found.step()
    except KeyError:
        return _Adagrad
    return torch.optim.Adagrad


class _Adagrad(torch.optim.Adagrad):
    """As torch 2.13: state is made in the step too, for parameters that have joined since construction."""

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        start = self.defaults["initial_accumulator_value"]
        for p in group["params"]:
            if p.grad is not None and not self.state[p]:
                step = torch.zeros((), device=p.device if group["fused"] else "cpu")
                value = complex(start, start) if p.is_complex() else start
                self.state[p].update(step=step, sum=torch.full_like(p, value))
        return super()._init_group(group, *lists)


@functools.cache
def oracle_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """An optimizer that steps by an oracle, arguments and state as torch.optim's classes have them."""
    ignored = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
    ignored |= AROUND
    oracle = ORACLES[name]
    options = inspect.signature(getattr(fusedcalib, name)).parameters
    whole = ("params", "backend", "offload")
    defaults = {k: v.default for k, v in options.items() if k not in whole} | ignored

    class Slow(torch.optim.Optimizer):
        def __init__(self, params: Any, **options: Any) -> None:
            assert options.keys() <= defaults.keys()
            super().__init__(params, {**defaults, **options})

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            with torch.enable_grad():
                loss = closure() if closure else None
            for group in self.param_groups:
                own = {k: number(group[k]) for k in defaults.keys() - ignored.keys()}
                for p in group["params"]:
                    if p.grad is not None:
                        given = {k: real(v) for k, v in self.state.get(p, {}).items()}
                        value, state = oracle(real(p).clone(), real(p.grad), given, **own)
                        real(p).copy_(value)
                        if state:
                            self.state[p] = {k: as_stored(v, p) for k, v in state.items()}
            return loss

    Slow.__name__ = name
    return Slow


def number(value: Any) -> Any:
    """An option as the oracles take it: no tensors, None for no limit."""
    value = value.item() if isinstance(value, torch.Tensor) else value
    return None if value == math.inf else value


def real(value: Any) -> Any:
    """Complex numbers as pairs, which is how torch.optim's rules see them."""
    return torch.view_as_real(value) if torch.is_tensor(value) and value.is_complex() else value


def as_stored(value: Any, p: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        return torch.tensor(float(value))
    return torch.view_as_complex(value.contiguous()) if p.is_complex() else value
