"""Where the updates of matrices lie: those of one shape side by side, so that they are iterated together."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .newton_schulz import Iteration, Workspaces, at_once, iteration_of, orthogonalize

UPDATE = "update"  # the state whose tensors are parts of a batch; it is made anew, never saved
State = MutableMapping[Tensor, Any]


def matrices_in(shape: Sequence[int]) -> tuple[int, int, int]:
    """How many matrices a parameter is, their rows, their columns.

    [out, in] is one, [E, out, in] are E, [out, in, height, width] is one with a row for each output.
    """
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    columns = 1
    for size in shape[1:]:
        columns *= size
    return 1, shape[0], columns


_Kind = tuple[Iteration, torch.Size, torch.device]  # what the parameters of a batch have in common


class Batches:
    """The updates of the parameters of an optimizer that have gradients, in bf16, in batches.

    They are laid out anew where other parameters have gradients, or are iterated otherwise.
    """

    def __init__(self) -> None:
        self._spaces = Workspaces()
        self._params: list[Tensor] = []
        self._kinds: list[_Kind] = []
        self._batches: list[tuple[Tensor, Iteration]] = []
        self._updates: list[Tensor] = []

    def attach(self, groups: Sequence[Mapping[str, Any]], state: State) -> None:
        """Gives every parameter of these groups that has a gradient its update, as the state of that name."""
        params, kinds = [], []
        for group in groups:
            how = iteration_of(group)
            own = [param for param in group["params"] if param.grad is not None]
            params += own
            kinds += [(how, param.shape, param.device) for param in own]
        if kinds != self._kinds or not all(map(is_, params, self._params)):
            self._lay_out(params, kinds)
        if not all(map(is_, (state[param].get(UPDATE) for param in params), self._updates)):
            for param, update in zip(params, self._updates, strict=True):
                state[param][UPDATE] = update

    def _lay_out(self, params: list[Tensor], kinds: list[_Kind]) -> None:
        alike: dict[Any, list[Tensor]] = {}
        for param, (how, shape, device) in zip(params, kinds, strict=True):
            alike.setdefault((how, matrices_in(shape)[1:], device), []).append(param)
        updates: dict[Tensor, Tensor] = {}
        batches = []
        for (how, sides, device), members in alike.items():
            counts = [matrices_in(p.shape)[0] for p in members]
            batch = torch.zeros((sum(counts), *sides), dtype=torch.bfloat16, device=device)
            for param, part in zip(members, torch.split(batch, counts), strict=True):
                updates[param] = part.view(param.shape)
            if batch.numel():
                self._spaces.reserve(batch, min(len(batch), at_once(batch)))
                batches.append((batch, how))
        self._batches, self._params, self._kinds = batches, params, kinds
        self._updates = [updates[param] for param in params]

    def orthogonalize(self) -> int:
        """Orthogonalizes all of them; returns the number of matrix products."""
        products = 0
        for batch, how in self._batches:
            for some in torch.split(batch, at_once(batch)):
                products += orthogonalize(some, how, self._spaces)
        return products
