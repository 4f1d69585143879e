"""What a step is measured to be: seven numbers of each slot, over the ranks where it is spread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.observed import OBSERVED
from .buckets import Slot
from .shards import summed
from .split_rows import Packed, place_of_slot


class Statistics(Packed):
    """Those of the slots of a plan, where they are asked for: see kernels/observed.py.

    Attributes:
        params: the parameters that are measured.
        parts: fp64 [OBSERVED] each, by the numbers of the slots, in any order.
        scale: fp64, by which the gradients of the last step were too large; None if they never were.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        found = {i: OBSERVED for i, slot in enumerate(slots) if slot.recipe.flags.statistics}
        super().__init__(slots, found, {i: place_of_slot(slots[i]).parted for i in found})
        self.params = [slots[i].param for i in found]
        self.scale: Tensor | None = None

    def add_up(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Over ranks, in place: a collective for the sums and one for maxima, for each dimension of a mesh.

        Args:
            grad_scale, found_inf: of a GradScaler, if the step unscales: with found_inf it is left out.
        """
        if grad_scale is not None:
            self._note_scale(grad_scale, found_inf)
        for part in self._idle:
            part.zero_()
        largest = [self._largest(*pack) for pack in self._packs]
        super().add_up()
        for (pack, _, dimensions), values in zip(self._packs, largest, strict=True):
            if dimensions:
                pack.view(-1, OBSERVED)[:, -1].copy_(values)

    def _largest(self, pack: Tensor, mesh: object, dimensions: tuple[int, ...]) -> Tensor:
        """The maxima over ranks, of which there are several."""
        values = pack.view(-1, OBSERVED)[:, -1]
        return summed(values.clone(), mesh, dimensions, largest=True) if dimensions else values

    def _note_scale(self, scale: Tensor, found_inf: Tensor | None) -> None:
        there = next(iter(self.parts.values())).device
        now = scale.detach().to(there, torch.float64, non_blocking=True).reshape(())
        if self.scale is None:
            self.scale = torch.ones((), dtype=torch.float64, device=there)
        if found_inf is not None:
            left_out = found_inf.to(there, non_blocking=True).reshape(()) != 0
            now = torch.where(left_out, self.scale, now)
        self.scale.copy_(now)
