"""A step decided on the device: nothing is waited for, so that all of it can be captured in a graph.

A GPU's gradients, the loss scale and a captured graph's replays are known to the GPU alone. There the numbers
of a step are computed by the launch that measures the gradients, or by one program where none does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels import launch
from ...layout.buckets import Bucket, prepare
from ...layout.counts import on_device, values_of
from ...layout.inputs import PlanInputs, begun, entries_of_slots, meshes_of, norm_dtype, product_of
from ...layout.recipe import Asked
from ...layout.scalars import Scalars, leaves_of, shape_of, tape_of
from ...layout.shards import summed
from .measured import Measured, lists_of
from .resident import Array, DeviceArray, Streams, capturing, sent
from .run import backend, guarded


class DeviceDecider:
    """Counts and scalars on the device that steps; nothing is waited for, so all of it can be captured.

    The launches are those of kernels/decide.py. The host only hands over the options of the groups, where
    they changed. Slots that had taken as many steps when the plan was made, and take all later ones together,
    share a row from then on.
    """

    on_device = True

    def __init__(self, work: PlanInputs, scalars: Scalars, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        # The step begins with the first, which is then the latest that the caches have seen.
        self._measured = [Measured(members) for members in lists_of(buckets)] if work.needs.measure else []
        device = self._device = buckets[0].key.device
        self._recipes = work.recipes
        needs = self._needs = work.needs
        entries, name = entries_of_slots(work), product_of(work)
        for i, (slot, new) in enumerate(zip(work.slots, work.fresh, strict=True)):
            if not slot.recipe.counts:
                entries[i] = work.counters.private(slot.param, new)
        begin, most = begun(work)
        ones = np.ones_like(begin)
        steps = on_device("step", entries, begin, device, sent)
        products = on_device(name, entries, ones, device, sent) if name else []
        history = [np.array([slot.group for slot in work.slots]), work.kin, values_of(steps)]
        if name:
            history.append(values_of(products))
        found, example, used = np.unique(
            np.stack(history, axis=1), axis=0, return_index=True, return_inverse=True
        )
        self._group_rows = {int(g): np.flatnonzero(found[:, 0] == g) for g in np.unique(found[:, 0])}
        self._versions: dict[int, int] = {}
        rows = self._rows = used.reshape(-1)
        for bucket in buckets:
            bucket.set_rows(rows)
        self._tape = tape_of(work.recipes[0].rule, shape_of(work.groups[0]))
        leaves, width = len(self._tape.leaves), len(self._tape.outputs) - 1
        # fp64 numbers, with one more line than leaves where the kernel notes new products; then sources.
        self._split = (leaves + 1) * len(found) + (leaves + 1) * len(found) % 2
        self._shape = (leaves, len(found))
        self._values = np.zeros(self._split + leaves * len(found), dtype=np.int64)
        self._options = DeviceArray(device, self._values)
        self._leaves: dict[int, list[float | Tensor]] = {}  # of each group, whose addresses these may be
        self._captured: list[Any] = []  # leaves that graphs go on reading
        computes = {bucket.compute for bucket in buckets}
        for compute in computes:
            scalars.resident[compute] = torch.zeros(len(found), width, dtype=compute, device=device)
        scalars.set([(0.0,) * width] * len(found))
        self._meshes = meshes_of(work)
        programs = self._make_sums()
        sizes = np.array([len(found), len(work.slots), programs], dtype=np.int32)
        constants = (example.astype(np.int32), rows.astype(np.int32), addresses_of(steps, device), most)
        self._sizes = sent(device, sizes)
        self._of_slots = (
            *(sent(device, values) for values in constants),
            sent(device, addresses_of(products, device)) if name else None,
        )
        self._counters = (steps, products)  # whose addresses these are
        rows_of = scalars.resident.get
        self._report_on = partial(work.report.on, device, norm_dtype(buckets) if needs.measure else None)
        self._after = (self._report_on(), rows_of(torch.float32), rows_of(torch.float64))
        self._spec = launch.DeciderSpec(self._tape.code, self._tape.outputs, leaves, needs.check)
        self._launches: list[launch.Launch] = []
        self._read: tuple[Any, ...] = ()  # what launches read that may be another at the next step
        self._streams = Streams(device)

    def _make_sums(self) -> int:
        """Where the launches leave their sums of squares; returns how many programs leave one."""
        grids = [launch.programs_for(each.tiles) for each in self._measured]
        firsts = np.cumsum([0, *grids])
        self._partials = torch.zeros(firsts[-1], dtype=torch.float64, device=self._device)
        self._done = torch.zeros(1, dtype=torch.int32, device=self._device)
        shares = [(each.tiles, first) for each, first in zip(self._measured, firsts[:-1], strict=True)]
        self._shares = [sent(self._device, np.array(share, dtype=np.int32)) for share in shares]
        self._weights: dict[object, Tensor] = {}  # of each program's sum in that over a mesh
        for mesh in (None, *self._meshes) if self._meshes else ():
            weights = np.zeros(firsts[-1])
            for each, first, last in zip(self._measured, firsts[:-1], firsts[1:], strict=True):
                if each.key.mesh == mesh:
                    weights[first:last] = 1 / each.key.copies
            self._weights[mesh] = sent(self._device, weights)
        self._total = torch.zeros(1, dtype=torch.float64, device=self._device)
        return int(firsts[-1])

    def resume(self) -> None:
        """Takes up after steps of other plans, which have reported last."""
        self._report_on()

    def refresh(self, asked: Asked) -> None:
        """Hands over the options of the groups where they changed."""
        changed = [g for g in self._group_rows if self._versions.get(g) != asked.versions[g]]
        if changed:
            values = self._values.copy()
            numbers = values.view(np.float64)[: self._shape[0] * self._shape[1]].reshape(self._shape)
            sources = values[self._split :].reshape(self._shape)
            found = {}
            for group in changed:
                rows = self._group_rows[group]
                leaves = leaves_of(self._tape, self._recipes[group], asked.groups[group])
                for i, leaf in enumerate(leaves):
                    if isinstance(leaf, Tensor):
                        numbers[i, rows], sources[i, rows] = 0.0, source_of(leaf, self._device)
                    else:
                        numbers[i, rows], sources[i, rows] = leaf, 0
                found[group] = leaves
            self._values = values
            self._leaves |= found
            self._versions |= {group: asked.versions[group] for group in changed}
        if not capturing():
            self._options.update(self._values)
            if self._needs.remote:
                self._options.prepare_capture()

    def ready(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """Makes all ready to be launched; the device decides whether the step is taken."""
        prepare(self._buckets)
        options = self._options.tensor
        if capturing():
            options = self._options.captured(self._values)
            self._captured.append(dict(self._leaves))
        with guarded(self._device):
            for each in self._measured:
                each.up_to_date(self._buckets[0].cache["together"])
            gradients = [each.gradients for each in self._measured]
            read = (options, *map(self._here, (grad_scale, found_inf)), *gradients)
            if not self._launches:
                self._launches = self._made(read)
            elif any(x is not y for x, y in zip(read, self._read, strict=True)):
                control = self._control(read)
                for made, gradient in zip(self._launches, gradients, strict=False):
                    made.set(launch.GRADS, gradient)
                    made.set(launch.NORM_CONTROL, control)
                if not self._needs.measure or self._meshes:
                    self._launches[-1].set(launch.CONTROL, control)
            self._read = read
            for made in self._launches:
                made.prepare()
        self._streams.note(self._tensors)
        return True

    def _control(self, read: tuple[Any, ...]) -> launch.Control:
        """What `decide` of kernels/decide.py reads and writes."""
        options, grad_scale, found_inf = read[:3]
        numbers = options.view(torch.float64)[: self._split]
        tables: list[Any] = [self._sizes, numbers, options[self._split :], *self._of_slots]
        tables += [grad_scale, found_inf, *self._after]
        return launch.Control(*tables)

    def _made(self, read: tuple[Any, ...]) -> list[launch.Launch]:
        """The launches of a step that come before it."""
        control, made = self._control(read), []
        for each, share in zip(self._measured, self._shares, strict=True):
            sums = launch.Sums(share, self._partials, self._done)
            spec = launch.norm_spec(each.spec, None if self._meshes else self._spec)
            made.append(launch.norm_launch(*each.tables(), sums, control, spec, backend()))
        if not self._needs.measure or self._meshes:
            squares = self._total if self._needs.measure else None
            made.append(launch.control_launch(squares, control, self._spec))
        return made

    def decide(self) -> int:
        """Launches what measures and decides; returns how many launches that are."""
        with guarded(self._device):
            for each in self._launches[:-1]:
                each()
            if self._needs.measure and self._meshes:
                self._total.copy_(self._squares())
            self._launches[-1]()
        return len(self._launches)

    def _squares(self) -> Tensor:
        """Sum of the squares of all gradients, each element once, over the ranks where they are spread."""
        sums = [self._partials @ weights for weights in self._weights.values()]
        for mesh, total in zip(self._weights, sums, strict=True):
            if mesh is not None:
                summed(total, mesh)
        return torch.stack(sums).sum().reshape(1)

    def _here(self, flag: Tensor | None) -> Tensor | None:
        return None if flag is None else flag.to(self._device, torch.float32, non_blocking=True)

    def parted_by(self, live: list[bool]) -> bool:
        """Whether slots of which only some take a step share a row: it has the count of one of them."""
        taking = np.bincount(self._rows, live, self._shape[1])
        return bool(np.any((taking > 0) & (taking < np.bincount(self._rows))))

    def advance(self) -> None:
        """The device has counted."""

    def _tensors(self) -> list[Tensor]:
        """What lies on the device, but counters and the report, which are not the plan's."""
        found = (self._options.tensor, self._sizes, *self._of_slots, *self._after[1:], self._partials)
        more = (self._done, *self._shares, *self._weights.values(), self._total)
        more += tuple(t for each in self._measured for t in each.tensors())
        return [t for t in (*found, *more) if t is not None]


def addresses_of(counters: Sequence[Tensor], device: torch.device) -> Array:
    """Where 0-dim tensors lie."""
    return np.array([source_of(t, device) for t in counters], dtype=np.int64)


def source_of(leaf: Tensor, device: torch.device) -> int:
    """Where the kernel reads a number: an address, its lowest bit set for fp64."""
    if leaf.device != device:
        raise ValueError(f"a hyperparameter lies on {leaf.device}, the parameters on {device}; move it there")
    return leaf.data_ptr() + (leaf.dtype == torch.float64)
