"""A model with every kind of parameter that gradient release meets, trained with it and without."""

from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from cases import DEVICE, assert_identical
from rule_cases import RULES

import fusedcalib

WIDTH, ROWS, TOKENS = 64, 8, 16


class Net(torch.nn.Module):
    """Tied, frozen, seldom used and never used parameters, one of no dimension, and `foreign` ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        linear = torch.nn.Linear
        self.table, self.head = torch.nn.Embedding(ROWS, WIDTH), linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.table.weight
        self.first, self.second, self.foreign = (linear(WIDTH, WIDTH) for _ in range(3))
        self.frozen, self.seldom, self.unused = (linear(WIDTH, WIDTH) for _ in range(3))
        self.frozen.requires_grad_(False)
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.to(DEVICE, dtype)

    def forward(self, tokens: torch.Tensor, often: bool = True) -> torch.Tensor:
        x = torch.tanh(self.first(self.table(tokens)))
        x = self.gain * torch.tanh(self.foreign(self.frozen(x)))
        x = self.seldom(x) if not often else x
        return self.head(torch.tanh(self.second(x)))


class Run:
    """A training, of which every third step uses `seldom` and takes two micro-batches.

    Args:
        rule: the optimizer's name.
        bucket_bytes: of gradient release; None for backward(); step().
        dtype: of the weights.
        **options: the optimizer's, beside those of an ordinary run.
    """

    def __init__(
        self,
        rule: str,
        bucket_bytes: int | None,
        dtype: torch.dtype = torch.float32,
        backend: str = "eager",
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = model = Net(dtype)
        named = [(n, p) for n, p in model.named_parameters() if not n.startswith("foreign")]
        vectors, matrices = ([(n, p) for n, p in named if (p.ndim < 2) == flat] for flat in (True, False))
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": 0.005}]
        options = {**RULES[rule].options, "backend": backend, **options}
        self.optimizer = getattr(fusedcalib, rule)(groups, **options)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.foreign = [*model.foreign.parameters()]
        self.params = [p for p in model.parameters() if p.requires_grad and p not in {*self.foreign}]
        self.handle, self.taken = None, 0
        if bucket_bytes is not None:
            self.handle = fusedcalib.enable_gradient_release(model, self.optimizer, bucket_bytes)

    def loss(self, often: bool = True) -> torch.Tensor:
        tokens = torch.randint(ROWS, (2, TOKENS), device=DEVICE)
        return self.model(tokens, often).float().square().mean()

    def backward(self) -> None:
        """Of the coming step."""
        torch.manual_seed(100 + self.taken)
        often = self.taken % 3 != 2
        if not often:
            with self.handle.paused() if self.handle else nullcontext():
                self.loss().backward()
        self.loss(often).backward()

    def step(self, times: int = 1) -> "Run":
        for _ in range(times):
            self.optimizer.zero_grad()
            self.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.taken += 1
        return self

    def left(self) -> list[Any]:
        """All that the training has made: parameters, states, gradients of foreign parameters."""
        weights = [p.detach() for p in self.model.parameters()]
        return [weights, self.optimizer.state_dict()["state"], [p.grad for p in self.foreign]]


def hooks_of(run: Run) -> int:
    """How many hooks model and optimizer have."""
    found = [
        run.optimizer._optimizer_step_pre_hooks,
        run.optimizer._optimizer_step_post_hooks,
        run.model._forward_pre_hooks,
        *(p._post_accumulate_grad_hooks or {} for p in run.model.parameters()),
    ]
    return sum(map(len, found))


def closing(*handles: Any) -> ExitStack:
    """Removes them at the end."""
    stack = ExitStack()
    for handle in handles:
        stack.enter_context(handle)
    return stack


def unchanged(run: Run, before: Any) -> None:
    """Fails where parameters or states of a run are not as they were."""
    assert_identical(run.left()[:2], before[:2])
