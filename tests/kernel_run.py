"""Plain runs of an optimizer over given numbers, to be compared to the last bit."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from kernel_cases import Case, device_of
from kernel_trial import bits, gradient_values, parameter_values

INF, NAN = float("inf"), float("nan")
FULL_NAN = torch.tensor(2**63 - 1).view(torch.float64).item()  # that of GPUs: all bits but the sign
# Zeros of either sign, subnormals (of fp32, bf16 and fp64), and what overflows when it is squared.
SPECIAL = (0.0, -0.0, 1e-40, -1e-42, 1e-310, 1e-25, 1e21, -3e38, INF, -INF, NAN, FULL_NAN, 1.0)
SHAPES = ((3, 40), (7, 130), (2, 13), (9,), (4, 3, 2, 2), (5, 300), (2, 5000), (64, 64), ())

Numbers = tuple[list[torch.Tensor], list[list[torch.Tensor]]]  # where to start, gradients of each step
Tensors = dict[str, torch.Tensor]  # the parameter and its state


def ordinary(steps: int = 2) -> Numbers:
    start = [parameter_values(shape) for shape in SHAPES]
    return start, [[gradient_values(shape) for shape in SHAPES] for _ in range(steps)]


def special(steps: int = 3) -> Numbers:
    """Every special value against every other, beside ordinary ones."""
    values = torch.tensor(SPECIAL, dtype=torch.float64)
    pairs = torch.cartesian_prod(values, values).T
    start = torch.cat([pairs[0], torch.randn(5000, dtype=torch.float64)])
    rest = [torch.randn(5000, dtype=torch.float64) for _ in range(steps)]
    return [start], [[torch.cat([pairs[1].roll(i), rest[i]])] for i in range(steps)]


def run(
    backend: str,
    case: Case,
    start: Iterable[torch.Tensor],
    gradients: Iterable[Iterable[torch.Tensor]],
    arrange: Callable[[list[torch.nn.Parameter]], list[list[dict[str, Any]]]] | None = None,
) -> list[Tensors]:
    """Parameter and state of each tensor after one step for each list of gradients.

    `arrange` sorts the parameters into optimizers: a list of param groups each.
    """
    device = device_of(backend)
    params = [torch.nn.Parameter(t.to(device, case.dtypes.param, copy=True)) for t in start]
    options = {"backend": backend, **case.options}
    sorted_in = arrange(params) if arrange else [[{"params": params}]]
    optimizers = [case.ours(groups, **options) for groups in sorted_in]
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for gradient in gradients:
        for p, g in zip(params, gradient, strict=True):
            p.grad_dtype = case.dtypes.grad
            p.grad = g.to(device, case.dtypes.grad, copy=True)
        for optimizer in optimizers:
            optimizer.step()
    return [{"param": p.detach(), **owner[p].state.get(p, {})} for p in params]


def assert_same_bits(found: list[Tensors], expected: list[Tensors]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            message = f"{name} of tensor {i}"
            torch.testing.assert_close(bits(a[name]), bits(b[name]), rtol=0, atol=0, msg=message)
