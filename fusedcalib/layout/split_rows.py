"""Sums over rows that lie on several ranks, packed: one collective adds up those of all parameters."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .buckets import Slot
from .shards import local_of, summed


class RowTotals:
    """A number for each row: the ranks leave sums over what they have of it, and find those of all.

    Laid out by the order of the slots and not by launches, which may differ from rank to rank.

    Args:
        slots: those of a plan; also such as have no element here, where other ranks have some.

    Attributes:
        centred, projected: whether means, and norms, of such rows are asked for.
        parts: fp64 [rows], of those slots whose rows are not whole, by the slot's number.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        found: dict[Any, list[tuple[int, int]]] = {}
        flags = []
        for index, slot in enumerate(slots):
            if not (slot.place and slot.place.across):
                continue
            recipe = slot.compiled()
            if recipe.flags.by_rows:
                local = local_of(slot.param)
                where = (slot.place.mesh, slot.place.across, local.device)
                found.setdefault(where, []).append((index, prod(local.shape[: slot.leading])))
                flags.append(recipe.flags)
        self.centred = any(f.means for f in flags)
        self.projected = any(f.project for f in flags)
        self._packs: list[tuple[Tensor, Any, tuple[int, ...]]] = []
        self.parts: dict[int, Tensor] = {}
        for (mesh, across, device), members in found.items():
            pack = torch.zeros(sum(rows for _, rows in members), dtype=torch.float64, device=device)
            self._packs.append((pack, mesh, across))
            parts = torch.split(pack, [rows for _, rows in members])
            self.parts |= {index: part for (index, _), part in zip(members, parts, strict=True)}
        # No kernel writes these: what the sum over ranks left there must not be counted again.
        self._idle = [part for i, part in self.parts.items() if not local_of(slots[i].param).numel()]

    def add_up(self) -> None:
        """Over ranks, in place: one collective for each dimension of a mesh over which rows are split."""
        for part in self._idle:
            part.zero_()
        for pack, mesh, across in self._packs:
            summed(pack, mesh, across)
