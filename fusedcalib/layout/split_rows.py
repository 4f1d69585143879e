"""Sums over what lies on several ranks, packed: one collective adds up those of all parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .buckets import Slot
from .shards import Place, local_of, summed


class Packed:
    """Numbers of each slot in one tensor: the ranks leave what they have of a sum, and find that of all.

    Laid out by the order of the slots and not by launches, which may differ from rank to rank.

    Args:
        slots: those of a plan; also such as have no element here, where other ranks have some.
        lengths: of some slots, by their numbers: how many numbers they have.
        across: of each of these the dimensions of its mesh over which they are added up.

    Attributes:
        parts: fp64, of these slots by their numbers; those on one device lie in one memory.
    """

    def __init__(
        self, slots: Sequence[Slot], lengths: Mapping[int, int], across: Mapping[int, tuple[int, ...]]
    ) -> None:
        found: dict[torch.device, dict[Any, list[int]]] = {}
        for index in lengths:
            where = found.setdefault(local_of(slots[index].param).device, {})
            where.setdefault((place_of_slot(slots[index]).mesh, across[index]), []).append(index)
        self._packs: list[tuple[Tensor, Any, tuple[int, ...]]] = []
        self.parts: dict[int, Tensor] = {}
        for device, groups in found.items():
            counts = [[lengths[index] for index in members] for members in groups.values()]
            whole = torch.zeros(sum(map(sum, counts)), dtype=torch.float64, device=device)
            packs = torch.split(whole, [*map(sum, counts)])
            for (mesh, dimensions), members, pack, of_slots in zip(
                groups, groups.values(), packs, counts, strict=True
            ):
                self._packs.append((pack, mesh, dimensions))
                self.parts |= dict(zip(members, torch.split(pack, of_slots), strict=True))
        # No kernel writes these: what the sum over ranks left there must not be counted again.
        self._idle = [part for i, part in self.parts.items() if not local_of(slots[i].param).numel()]

    def add_up(self) -> None:
        """Over ranks, in place: one collective for each dimension of a mesh over which there is something."""
        for part in self._idle:
            part.zero_()
        for pack, mesh, dimensions in self._packs:
            summed(pack, mesh, dimensions)


class RowTotals(Packed):
    """A number for each row, of slots whose rows are not whole.

    Attributes:
        centred, projected: whether means, and norms, of such rows are asked for.
        parts: fp64 [rows] each.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        split = [i for i, slot in enumerate(slots) if slot.place and slot.place.across]
        flags = {i: slots[i].compiled().flags for i in split}
        split = [i for i in split if flags[i].by_rows]
        self.centred = any(flags[i].means for i in split)
        self.projected = any(flags[i].project for i in split)
        rows = {i: prod(local_of(slots[i].param).shape[: slots[i].leading]) for i in split}
        super().__init__(slots, rows, {i: place_of_slot(slots[i]).across for i in split})


class TensorTotals(Packed):
    """Sums of squares over whole tensors, of slots whose rules want them: see kernels/totals.py.

    Attributes:
        parts: fp64 [sums + 1] each; the last is the number of elements.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        trusts = ((i, slot, slot.recipe.rule.trust) for i, slot in enumerate(slots))
        sums = {i: trust.sums + 1 for i, slot, trust in trusts if trust and slot.recipe.flags.trust != "none"}
        super().__init__(slots, sums, {i: place_of_slot(slots[i]).parted for i in sums})


def place_of_slot(slot: Slot) -> Place:
    """Its place; that of a whole tensor where it is not spread."""
    return slot.place or Place(0, 0)
