"""A step decided on the device: nothing is waited for, so that all of it can be captured in a graph.

A GPU's gradients, the loss scale and a captured graph's replays are known to the GPU alone. There the numbers
of a step are computed by the launch that measures the gradients, or by one program where none does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .control import Counts, Groups, Work, meshes_of, norm_dtype
from .distributed import summed
from .gpu import backend, guarded, resident_of
from .kernels import launch
from .mirror import Mirror, capturing
from .scalars import leaves_of, shape_of, tape_of
from .tables import Bucket, Scalars


class DeviceControl:
    """Counts and scalars on the device that steps; nothing is waited for, so all of it can be captured.

    The launches are those of kernels/control.py. The host only hands over the options of the groups, where
    they changed. Slots that had taken as many steps when the plan was made share a row from then on.
    """

    def __init__(self, work: Work, scalars: Scalars, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        device = self._device = buckets[0].key.device
        self._recipes = work.recipes
        demand = self._demand = work.demand
        counts = Counts(work)
        of_groups = np.array([slot.group for slot in work.slots], dtype=np.int64)
        history = np.stack([of_groups, counts.taken, counts.products], axis=1)
        found, example, used = np.unique(history, axis=0, return_index=True, return_inverse=True)
        self._group_rows = {int(g): np.flatnonzero(found[:, 0] == g) for g in np.unique(found[:, 0])}
        self._seen: dict[int, dict[str, object]] = {group: {} for group in self._group_rows}
        rows = used.reshape(-1)
        for bucket in buckets:
            bucket.set_rows(rows)
        self._tape = tape_of(work.recipes[0].rule, shape_of(work.groups[0]))
        leaves, width = len(self._tape.leaves), len(self._tape.outputs) - 1
        # One more line than leaves: the kernel notes new products there.
        self._numbers = Mirror(device, np.zeros((leaves + 1, len(found))))
        self._sources = Mirror(device, np.zeros((leaves, len(found)), dtype=np.int64))
        taken = counts.share("step", counts.taken, device)
        products = counts.share("product", counts.products, device)
        computes = {bucket.compute for bucket in buckets}
        for compute in computes:
            scalars.resident[compute] = torch.zeros(len(found), width, dtype=compute, device=device)
        scalars.set(np.zeros((len(found), width)))
        grids = [launch.programs_for(len(bucket.tiles)) for bucket in buckets] if demand.measure else []
        firsts = np.cumsum([0, *grids])
        self._partials = torch.zeros(firsts[-1], dtype=torch.float64, device=device)
        self._done = torch.zeros(1, dtype=torch.int32, device=device)
        self._shares = {
            bucket: torch.tensor([len(bucket.tiles), first], dtype=torch.int32, device=device)
            for bucket, first in zip(buckets, firsts[:-1], strict=False)
        }
        self._meshes = meshes_of(work)
        self._weights: dict[object, Tensor] = {}  # of each program's sum in that over a mesh
        for mesh in (None, *self._meshes):
            weights = np.zeros(firsts[-1])
            for bucket, first, last in zip(buckets, firsts[:-1], firsts[1:], strict=False):
                if bucket.key.mesh == mesh:
                    weights[first:last] = 1 / bucket.key.copies
            self._weights[mesh] = torch.from_numpy(weights).to(device)
        sizes = torch.tensor([len(found), len(work.slots), firsts[-1]], dtype=torch.int32, device=device)
        slot_of_row, row_of_slot = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (example, rows))
        most = torch.from_numpy(counts.most).to(device)
        numbers, sources = self._numbers.tensor, self._sources.tensor
        self._before = (sizes, numbers, sources, slot_of_row, row_of_slot, taken, most, products)
        rows_of = scalars.resident.get
        report = work.outcome.on(device, norm_dtype(buckets) if demand.measure else None)
        self._after = (report, rows_of(torch.float32), rows_of(torch.float64))
        self._decision = launch.Decision(self._tape.code, self._tape.outputs, leaves, demand.check)

    def refresh(self, groups: Groups) -> None:
        """Hands over the options of the groups where they changed."""
        numbers, sources = self._numbers.host.copy(), self._sources.host.copy()
        for group, rows in self._group_rows.items():
            options = {key: value for key, value in groups[group].items() if key != "params"}
            # A tensor on the host may change where it lies.
            known = not any(Tensor in map(type, v) for v in (options.values(), options.get("betas", ())))
            if known and options == self._seen[group]:
                continue
            self._seen[group] = copy.deepcopy(options) if known else {}
            for i, leaf in enumerate(leaves_of(self._tape, self._recipes[group], groups[group])):
                if isinstance(leaf, Tensor):
                    numbers[i, rows], sources[i, rows] = 0.0, source_of(leaf, self._device)
                else:
                    numbers[i, rows], sources[i, rows] = leaf, 0
        for mirror, values in ((self._numbers, numbers), (self._sources, sources)):
            mirror.update(values)
            if self._demand.remote and not capturing():
                mirror.prepare_capture()

    def decide(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> tuple[bool, int]:
        """Launches what measures and decides; returns that the step is to be launched, and those launches."""
        tensors = (*self._before, *map(self._here, (grad_scale, found_inf)), *self._after)
        with guarded(self._device):
            if not self._demand.measure:
                return True, launch.launch_control(None, tensors, self._decision)
            for bucket in self._buckets:
                resident = resident_of(bucket)
                table, tiles = resident.up_to_date(bucket)
                launch.launch_norm(
                    table,
                    tiles,
                    self._shares[bucket],
                    self._partials,
                    self._done,
                    tensors,
                    resident.spec,
                    self._decision,
                    not self._meshes,
                    backend(),
                )
            launches = len(self._buckets)
            if self._meshes:
                launches += launch.launch_control(self._squares(), tensors, self._decision)
            return True, launches

    def _squares(self) -> Tensor:
        """Sum of the squares of all gradients, each element once, over the ranks where they are spread."""
        sums = [self._partials @ weights for weights in self._weights.values()]
        for mesh, total in zip(self._weights, sums, strict=True):
            if mesh is not None:
                summed(total, mesh)
        return torch.stack(sums).sum().reshape(1)

    def _here(self, flag: Tensor | None) -> Tensor | None:
        return None if flag is None else flag.to(self._device, torch.float32, non_blocking=True)

    def advance(self) -> None:
        """The device has counted."""


def source_of(leaf: Tensor, device: torch.device) -> int:
    """Where the kernel reads a number: an address, its lowest bit set for fp64."""
    if leaf.device != device:
        raise ValueError(f"a hyperparameter lies on {leaf.device}, the parameters on {device}; move it there")
    return leaf.data_ptr() + (leaf.dtype == torch.float64)
