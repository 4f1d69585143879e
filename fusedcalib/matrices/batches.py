"""Where the updates of matrices lie: those of one shape side by side, so that they are iterated together."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from operator import is_
from typing import Any, NamedTuple

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


class _Kind(NamedTuple):
    """What the matrices of a batch have in common."""

    rows: int
    columns: int
    device: torch.device
    how: Iteration


class _Live(NamedTuple):
    """A parameter with a gradient, and what its group asks for."""

    param: Tensor
    kind: _Kind


class Batches:
    """The updates of the parameters of an optimizer that have gradients, in bf16, in batches.

    They are laid out anew where other parameters have gradients, or are iterated otherwise.
    """

    def __init__(self) -> None:
        self._spaces = Workspaces()
        self._live: list[_Live] = []
        self._batches: list[tuple[Tensor, Iteration]] = []
        self._updates: list[Tensor] = []

    def attach(self, groups: Sequence[Mapping[str, Any]], state: State) -> None:
        """Gives every parameter of these groups that has a gradient its update, as the state of that name."""
        live = [
            _Live(param, _Kind(*matrices_in(param.shape)[1:], param.device, how))
            for group in groups
            for how in (iteration_of(group),)
            for param in group["params"]
            if param.grad is not None
        ]
        same = len(live) == len(self._live) and all(
            now.param is then.param and now.kind == then.kind
            for now, then in zip(live, self._live, strict=True)
        )
        if not same:
            self._lay_out(live)
        if not all(map(is_, (state[each.param].get(UPDATE) for each in live), self._updates)):
            for each, update in zip(live, self._updates, strict=True):
                state[each.param][UPDATE] = update

    def _lay_out(self, live: list[_Live]) -> None:
        kinds: dict[_Kind, list[Tensor]] = {}
        for each in live:
            kinds.setdefault(each.kind, []).append(each.param)
        updates: dict[Tensor, Tensor] = {}
        batches = []
        for kind, params in kinds.items():
            counts = [matrices_in(p.shape)[0] for p in params]
            size = (sum(counts), kind.rows, kind.columns)
            batch = torch.zeros(size, dtype=torch.bfloat16, device=kind.device)
            for param, part in zip(params, torch.split(batch, counts), strict=True):
                updates[param] = part.view(param.shape)
            batches.append((batch, kind.how))
            if batch.numel():
                self._spaces.reserve(batch, min(len(batch), at_once(batch)))
        self._batches, self._live = batches, live
        self._updates = [updates[each.param] for each in live]

    def orthogonalize(self) -> int:
        """Orthogonalizes all of them; returns the number of matrix products."""
        products = 0
        for batch, how in self._batches:
            if batch.numel():
                for some in torch.split(batch, at_once(batch)):
                    products += orthogonalize(some, how, self._spaces)
        return products
