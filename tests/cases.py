"""Tables that several test files share, and a training run done twice: here and in torch."""

import copy
import functools
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

import fusedcalib
from fusedcalib.reference import ORACLES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = {"cuda": "triton", "cpu": "numba" if importlib.util.find_spec("numba") else None}[DEVICE]
BACKENDS = [name for name in (FUSED, "eager") if name]


@dataclass(frozen=True)
class Rule:
    """One optimizer class, an ordinary run's options, and the state that torch makes for them."""

    name: str
    options: dict[str, Any]
    moments: tuple[str, ...]
    counted: bool = True

    @property
    def ours(self) -> type[torch.optim.Optimizer]:
        return getattr(fusedcalib, self.name)

    @property
    def theirs(self) -> type[torch.optim.Optimizer]:
        """torch.optim's class of that name, or one made of the oracle where there is none."""
        return getattr(torch.optim, self.name, None) or oracle_optimizer(self.name)


DECAY = {"lr": 0.02, "weight_decay": 0.1}
ADAM = {**DECAY, "betas": (0.8, 0.95)}
MOMENTUM = {**DECAY, "momentum": 0.9}
BOTH = ("exp_avg", "exp_avg_sq")
RULES = {
    rule.name: rule
    for rule in (
        Rule("SGD", {**MOMENTUM, "lr": 0.1}, ("momentum_buffer",), False),
        Rule("SGDW", MOMENTUM, ("momentum_buffer",), False),
        Rule("Adam", ADAM, BOTH),
        Rule("AdamW", ADAM, BOTH),
        Rule("Adagrad", {**DECAY, "initial_accumulator_value": 0.1}, ("sum",)),
        Rule("Adadelta", {**DECAY, "lr": 1.0, "eps": 1e-3}, ("square_avg", "acc_delta")),
        Rule("RMSprop", {**MOMENTUM, "alpha": 0.9, "eps": 0.1}, ("square_avg", "momentum_buffer")),
        Rule("Adamax", ADAM, ("exp_avg", "exp_inf")),
        Rule("NAdam", ADAM, BOTH),
        Rule("RAdam", ADAM, BOTH),
        Rule("Lion", {**ADAM, "lr": 0.01}, ("exp_avg",), False),
        Rule("Signum", MOMENTUM, ("momentum_buffer",), False),
        Rule(
            "Adan",
            {**DECAY, "betas": (0.8, 0.7, 0.95)},
            ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad"),
        ),
        Rule("ADOPT", {**ADAM, "eps": 0.1}, BOTH),
    )
}


@functools.cache
def oracle_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """An optimizer that steps by an oracle, arguments and state as torch.optim's classes have them."""
    ignored = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
    oracle = ORACLES[name]
    options = inspect.signature(getattr(fusedcalib, name)).parameters
    defaults = {k: v.default for k, v in options.items() if k not in ("params", "backend")}
    defaults = {k: math.inf if v is None else v for k, v in defaults.items()} | ignored

    class Slow(torch.optim.Optimizer):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, {**defaults, **options})

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            with torch.enable_grad():
                loss = closure() if closure else None
            for group in self.param_groups:
                own = {k: v for k, v in group.items() if k in defaults.keys() - ignored.keys()}
                for p in group["params"]:
                    if p.grad is not None:
                        value, state = oracle(p.clone(), p.grad, self.state[p], **own)
                        p.copy_(value)
                        if state:
                            self.state[p] = {k: as_stored(k, v) for k, v in state.items()}
            return loss

    def as_stored(key: str, value: Any) -> torch.Tensor:
        return value if isinstance(value, torch.Tensor) else torch.tensor(float(value))

    Slow.__name__ = name
    return Slow


# A matrix, an odd vector, a scalar, nothing at all, a convolution's weight.
SHAPES = ((5, 7), (33,), (), (0, 3), (4, 3, 2, 2))


def parameters(
    shapes: Iterable[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    device: str = DEVICE,
) -> list[torch.nn.Parameter]:
    wide = torch.promote_types(dtype, torch.float32)
    values = [torch.randn(shape, dtype=wide).to(device, dtype) for shape in shapes]
    return [torch.nn.Parameter(value) for value in values]


def twins(tensors: Iterable[torch.Tensor]) -> list[torch.nn.Parameter]:
    """The same values in other memory, strides kept."""
    return [torch.nn.Parameter(t.detach().clone()) for t in tensors]


def tolerance(dtype: torch.dtype, steps: int) -> float:
    """How far two right answers may lie apart.

    Both do the same operations in another order: in a step at most 16 roundings, each of half a
    unit in the last place of a value below 8, and what one step is off stays in the next ones.
    """
    return steps * 16 * 8 / 2 * torch.finfo(dtype).eps


class Twin:
    """One training run under two optimizers: `ours` over `params`, `theirs` over `expected`."""

    def __init__(
        self,
        rule: Rule,
        backend: str,
        params: list[torch.nn.Parameter],
        expected: list[torch.nn.Parameter] | None = None,
        arrange: Callable[[list[torch.nn.Parameter]], Any] = list,
        **options: Any,
    ) -> None:
        self.rule, self.steps = rule, 0
        self.params = params
        self.expected = twins(params) if expected is None else expected
        self.ours = rule.ours(arrange(self.params), backend=backend, **options)
        if not {"foreach", "fused"} & options.keys():
            options["foreach"] = False  # the plain loop is what the others are measured by
        self.theirs = rule.theirs(arrange(self.expected), **options)

    @property
    def sides(self) -> tuple[tuple[torch.optim.Optimizer, list[torch.nn.Parameter]], ...]:
        return (self.ours, self.params), (self.theirs, self.expected)

    def both(self, change: Callable[[torch.optim.Optimizer, list[torch.nn.Parameter]], Any]) -> None:
        """Do the same to the optimizer and the parameters of each side."""
        for side in self.sides:
            with torch.no_grad():
                change(*side)

    def gradients(self, missing: Iterable[int] = ()) -> None:
        """New gradients, the same on both sides, none for those in `missing`; always contiguous."""
        for i, (p, q) in enumerate(zip(self.params, self.expected, strict=True)):
            p.grad = None if i in missing else torch.randn(p.shape, dtype=p.dtype, device=p.device)
            q.grad = None if i in missing else p.grad.to(q.dtype, copy=True)

    def step(self, times: int = 1, missing: Iterable[int] = ()) -> "Twin":
        for _ in range(times):
            self.gradients(missing)
            self.ours.step()
            self.theirs.step()
            self.steps += 1
        return self

    def check(self, atol: float | None = None, state_atol: float | None = None) -> None:
        """Parameters and state agree to rounding, counters exactly."""
        for i, (p, q) in enumerate(zip(self.params, self.expected, strict=True)):
            rounding = tolerance(p.dtype, self.steps)
            mine, his = state_of(self.ours, p), state_of(self.theirs, q)
            assert mine.keys() == his.keys()
            for key in mine:
                limit = 0 if key == "step" else rounding if state_atol is None else state_atol
                assert_near(mine[key], his[key], limit, f"{key} of parameter {i}")
            assert_near(p, q, rounding if atol is None else atol, f"parameter {i}")


def train(optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    """Steps with new gradients for every parameter."""
    for _ in range(times):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        optimizer.step()


def documentation(cls: type) -> str:
    """The docstrings of a class and of those of this package that it is made from, in one line."""
    own = [c for c in cls.__mro__ if c.__module__.startswith(fusedcalib.__name__)]
    return " ".join(" ".join((c.__doc__ or "").split()) for c in own)


def state_of(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, Any]:
    """A copy of what is stored for `p`; unlike `optimizer.state[p]`, looking makes no entry."""
    return dict(optimizer.state.get(p, {}))


def snapshot(optimizer: torch.optim.Optimizer) -> list[Any]:
    """All a step may write, copied: parameters, gradients, state and counters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy([(p.detach(), state_of(optimizer, p)) for p in params])


def assert_near(actual: torch.Tensor, expected: torch.Tensor, atol: float, name: str) -> None:
    """Equal to an absolute limit whatever the dtypes; a NaN equals a NaN."""
    torch.testing.assert_close(
        actual.double() if actual.is_floating_point() else actual,
        expected.double() if expected.is_floating_point() else expected,
        rtol=0,
        atol=atol,
        equal_nan=True,
        check_device=False,
        msg=lambda text: f"{name}: {text}",
    )


def assert_identical(actual: Any, expected: Any) -> None:
    """Equal to the last bit, NaN included, through lists, tuples and dicts."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
