"""What several test files share, and a training run done twice: here and in torch."""

import copy
import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rule_cases import Rule

import fusedcalib

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = {"cuda": "triton", "cpu": "numba" if importlib.util.find_spec("numba") else None}[DEVICE]
BACKENDS = [name for name in (FUSED, "eager") if name]
# Loops take a second or more to compile for each rule and option, and what wraps a rule does not care which
# it is. Every rule in its loops is tests/test_kernels.py's.
BY_LOOPS = ("SGD", "AdamW")


def prepared(optimizer: torch.optim.Optimizer) -> Any:
    """The plan of the coming step, all host work done."""
    with torch.no_grad():
        return optimizer._engine.prepare(optimizer.param_groups, optimizer.state, optimizer._scaling())


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
    unit in the last place of a value below 8, or more of smaller values, and what one step is off
    stays in the next ones.
    """
    return steps * 16 * 8 / 2 * torch.finfo(dtype).eps


@functools.cache
def steps_fused(cls: type[torch.optim.Optimizer]) -> bool:
    """Whether it steps here with fused=True: torch's Adagrad once refused to on a GPU, in its step."""
    p = torch.nn.Parameter(torch.zeros(1, device=DEVICE))
    p.grad = torch.zeros_like(p)
    try:
        cls([p], fused=True).step()
    except RuntimeError:
        return False
    return True


class Twin:
    """One training run under two optimizers: `ours` over `params`, `theirs` over `expected`.

    `judge` is the class of `theirs`: torch.optim's, or the oracle's, which knows our own options.
    """

    def __init__(
        self,
        rule: Rule,
        backend: str,
        params: list[torch.nn.Parameter],
        expected: list[torch.nn.Parameter] | None = None,
        arrange: Callable[[list[torch.nn.Parameter]], Any] = list,
        judge: type[torch.optim.Optimizer] | None = None,
        **options: Any,
    ) -> None:
        self.rule, self.steps = rule, 0
        self.signs: list[torch.Tensor] = []
        self.params = params
        self.expected = twins(params) if expected is None else expected
        self.ours = rule.ours(arrange(self.params), backend=backend, **options)
        theirs = judge or rule.theirs
        if options.get("fused") and not steps_fused(theirs):
            del options["fused"]
        if not {"foreach", "fused"} & options.keys():
            options["foreach"] = False  # the plain loop is what the others are measured by
        self.theirs = theirs(arrange(self.expected), **options)

    def steady(self) -> "Twin":
        """From now on each element's gradient keeps its sign: its average is not near zero."""
        self.signs = [torch.randn(p.shape, device=p.device).sign() for p in self.params]
        return self

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
            p.grad = q.grad = None
            if i not in missing:
                p.grad = torch.randn(p.shape, dtype=p.dtype, device=p.device)
                if self.signs:
                    p.grad = ((p.grad.abs() + 0.5) * self.signs[i]).to(p.dtype)
                q.grad = p.grad.to(q.dtype, copy=True)

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
            if not mine and his.get("step") == 0:
                his = {}  # torch.optim.Adagrad makes its state at once
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
