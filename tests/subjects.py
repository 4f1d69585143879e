"""An oracle and an optimizer class under the same verbs, and the data of the property tests.

Every tolerance is a worst case: u = EPS / 2 is the error of one rounding, a mean of M numbers
below s is off by at most M u s, in whatever order it is summed.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import settings
from hypothesis import strategies as st

import fusedcalib
from fusedcalib import reference

EPS = torch.finfo(torch.float64).eps
DRIFT = 1e-12
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
LONG = settings(PROPERTY, max_examples=8)


class Oracle:
    """Weights under an oracle; the same few verbs as `Facade`."""

    def __init__(self, rule: str, params: Sequence[Any], **options: Any) -> None:
        groups = [p if isinstance(p, dict) else {"params": [p]} for p in params]
        self.params = [w for group in groups for w in group["params"]]
        self.states: list[dict[str, Any]] = [{} for _ in self.params]
        self.options = [options | group for group in groups for _ in group["params"]]
        self.function = reference.ORACLES[rule]

    def step(self, *grads: torch.Tensor) -> None:
        for i, (w, g, state) in enumerate(zip(self.params, grads, self.states, strict=True)):
            own = {key: value for key, value in self.options[i].items() if key != "params"}
            self.params[i], self.states[i] = self.function(w, g, state, **own)

    def change(self, **options: Any) -> None:
        self.options = [own | options for own in self.options]


class Facade:
    """Weights under a class of the package; `params` holds tensors or param groups of tensors."""

    def __init__(self, backend: str, rule: str, params: Sequence[Any], **options: Any) -> None:
        self.device = "cuda" if backend == "triton" else "cpu"
        self.leaves: list[torch.nn.Parameter] = []
        self.optimizer = getattr(fusedcalib, rule)([self.own(p) for p in params], backend=backend, **options)

    def own(self, entry: Any) -> Any:
        """Copy weights, strides and gaps between them included."""
        if isinstance(entry, dict):
            return entry | {"params": [self.own(p) for p in entry["params"]]}
        x = torch.empty_strided(entry.shape, entry.stride(), dtype=entry.dtype, device=self.device)
        self.leaves.append(torch.nn.Parameter(x.copy_(entry)))
        return self.leaves[-1]

    @property
    def params(self) -> list[torch.Tensor]:
        return [p.detach().cpu() for p in self.leaves]

    def step(self, *grads: torch.Tensor) -> None:
        for p, g in zip(self.leaves, grads, strict=True):
            p.grad = g.to(self.device)
        self.optimizer.step()

    def change(self, **options: Any) -> None:
        for group in self.optimizer.param_groups:
            group.update(options)


# numba is an optional dependency and triton needs a GPU; what is here is tested.
BACKENDS = ["eager"]
BACKENDS += ["numba"] if importlib.util.find_spec("numba") else []
BACKENDS += ["triton"] if torch.cuda.is_available() else []
FACADES = {name: partial(Facade, name) for name in BACKENDS}
SUBJECTS: dict[str, Callable[..., Any]] = {"oracle": Oracle, **FACADES}
each_subject = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS.keys())
# For what would compile loops of its own: those are the kernel tests', against the same oracles.
WITHOUT_LOOPS = {name: subject for name, subject in SUBJECTS.items() if name != "numba"}
each_without_loops = pytest.mark.parametrize("subject", WITHOUT_LOOPS.values(), ids=WITHOUT_LOOPS.keys())
each_facade = pytest.mark.parametrize("facade", FACADES.values(), ids=FACADES.keys())

MATRICES = ((1, 12), (5, 7), (3, 2), (4, 2, 5), (3, 1, 3, 3), (2, 3, 2, 2))
MATRIX = st.sampled_from(MATRICES)
SEED = st.integers(0, 2**32 - 1)
# Few combinations of options on purpose: a compiled backend takes seconds for each. So there is
# always a decay where a property allows one.
PLAIN = {"lr": 0.05, "weight_decay": 0.1}
MOMENTUM = PLAIN | {"momentum": 0.9}
NESTEROV = MOMENTUM | {"nesterov": True}
# A floor of 0.1 under the denominator bounds how much Adam can magnify a rounding of g.
ADAM = {"lr": 0.02, "eps": 0.1, "weight_decay": 0.1}
# Those whose roundings `path_bound` counts, and one of each other kind for what holds to the bit.
BOUNDED = {"SGD": NESTEROV, "Adam": ADAM, "AdamW": ADAM}
OTHERS = {"Adagrad": ADAM, "Lion": PLAIN, "Adan": ADAM, "ADOPT": ADAM}
RULES = BOUNDED | OTHERS
each_rule = pytest.mark.parametrize("rule", RULES)
each_bounded = pytest.mark.parametrize("rule", BOUNDED)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Numbers in [-1, 1], one tensor per shape."""
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.rand(s, generator=generator, dtype=torch.float64) - 1 for s in shapes]


def problem(seed: int, shape: tuple[int, ...], steps: int) -> tuple[Any, list[torch.Tensor]]:
    weight, *grads = draw(seed, *[shape] * (steps + 1))
    return weight, grads


def follow(subject: Any, rule: str, w: torch.Tensor, grads: Any, **options: Any) -> torch.Tensor:
    """The weights after one step per gradient."""
    run = subject(rule, [w], **options)
    for g in grads:
        run.step(g)
    return run.params[0]


def row_sums(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).sum(1)


def close(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(actual.contiguous().view(torch.int64), expected.view(torch.int64))


def path_bound(m: int, steps: int) -> float:
    """How far two right ways along one path of `steps` <= 10 from weights and gradients <= 1 part.

    SGD: weights stay below 8, each step rounds them twice; a direction is below 12, carries
    2 m + 12 roundings (two means, momentum, decay) and is scaled by lr = 0.05. Adam: an error of g
    reaches the direction at most 40-fold (twice each through m and through the root of v, which
    is a norm of the gradients, so moves no more than they do, over the floor of 0.1), lr = 0.02:
    0.8 (2 m + 12) is above both.
    """
    return steps * EPS * (8 + 0.8 * (2 * m + 12))
