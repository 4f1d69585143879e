"""What is decided in a step: its scalars, its number, whether it is taken. Here on the host.

That is where it is decided unless the host would have to wait for a GPU: see executors/triton/decide.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..hostmath import fp32, number_of
from ..layout.buckets import Array, Bucket, Executor, prepare
from ..layout.counts import Counters, Entries
from ..layout.inputs import PlanInputs, begun, entries_of_slots, meshes_of, norm_dtype, product_of
from ..layout.recipe import Asked, Needs
from ..layout.scalars import Scalars, StepFacts, numbers_of, row_of
from ..layout.shards import summed

Groups = Sequence[dict[str, Any]]


class Decider(Protocol):
    """Decides steps of a plan: their numbers, and whether they are taken."""

    on_device: bool

    def resume(self) -> None:
        """Takes up after steps of other plans, which have reported last."""

    def refresh(self, asked: Asked) -> None:
        """Takes over the options of the groups for the coming step."""

    def ready(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """Makes all ready to be launched; returns whether to step, as far as the host knows."""

    def decide(self) -> int:
        """Launches what decides on a device; returns how many launches that are."""

    def advance(self) -> None:
        """Counts a step."""

    def parted_by(self, live: list[bool]) -> bool:
        """Whether a step of these slots alone parts some that are counted as one."""


MakeDecider = Callable[[PlanInputs, Scalars, Sequence[Bucket]], Decider]


def decider_of(
    name: str, groups: Groups, places: set[tuple[Executor, torch.device]], needs: Needs
) -> MakeDecider | None:
    """What makes a decider on the device: where the host would wait, if one device has all of the step.

    Args:
        name: of the optimizer, for errors.
        groups: its param groups.
        places: (executor, device) of the parameters to step.
        needs: what the step is asked for.

    Raises:
        RuntimeError: `capturable` is asked for where that cannot be.
    """
    deciders = [executor.decider for executor, _ in places]
    possible = len(deciders) == 1 and deciders[0] is not None
    if any(group.get("capturable") for group in groups) and places and not possible:
        found = ", ".join(sorted(f"{device} ({executor.name})" for executor, device in places))
        raise RuntimeError(
            f"{name}: capturable=True needs all parameters on one GPU that Triton supports, but they are on "
            f"{found}; set capturable=False"
        )
    wanted = needs.remote or needs.measure or needs.scaled or needs.tentative
    return deciders[0] if possible and wanted else None


class HostDecider:
    """Counts and scalars on the host. What a device knows, as a norm, is waited for."""

    on_device = False

    def __init__(self, work: PlanInputs, scalars: Scalars, buckets: Sequence[Bucket]) -> None:
        self._scalars = scalars
        self._buckets = buckets
        self._recipes = work.recipes
        self._needs = work.needs
        self._meshes = meshes_of(work)
        there = buckets[0].key.device if buckets else torch.device("cpu")
        self._report_on = partial(work.report.on, there, norm_dtype(buckets) if work.needs.measure else None)
        self.resume()
        self._groups = np.array([slot.group for slot in work.slots], dtype=np.int64)
        self._firsts, self._of_slots = np.unique(self._groups, return_index=True, return_inverse=True)[1:]
        entries, everyone = entries_of_slots(work), work.state.values()
        room = sum(len(group["params"]) for group in work.groups)
        taken, self._most = begun(work)
        self._taken = HostCounts(work.counters, "step", entries, everyone, room, taken)
        self._product: HostCounts | None = None
        if name := product_of(work):
            ones = np.ones(len(work.slots), dtype=np.float32)
            self._product = HostCounts(work.counters, name, entries, everyone, room, ones)
        self._new_products = np.empty(0, dtype=np.float32)  # of each row
        self._rows: Array | None = None  # of each slot
        self._numbers: dict[int, tuple[int, dict[str, Any]]] = {}
        self._expected: bytes | None = None  # the counts as the last step has left them

    def resume(self) -> None:
        """Takes up after steps of other plans, which have reported last."""
        self._report = self._report_on()

    def refresh(self, asked: Asked) -> None:
        """Recomputes the scalars of the coming step: one row for each (group, step) that occurs."""
        self._asked = asked
        if self._expected is None or self._taken.note() != self._expected:
            self._found, rows = self._distinct()
            if rows is not self._rows:
                self._rows = rows
                for bucket in self._buckets:
                    bucket.set_rows(rows)
        self._write()

    def _write(self, norm: float = 0.0, scale: float = 1.0) -> None:
        values, products = [], []
        for group, step, *product in self._found:
            before = product[0] if product else 1.0
            now = StepFacts(step, before, norm, scale)
            row, after = row_of(self._recipes[group].rule, self._numbers_of(group), now)
            values.append(row)
            products.append(after)
        self._scalars.set(values)
        if self._product is not None:
            self._new_products = np.array(products, dtype=np.float32)

    def _numbers_of(self, group: int) -> dict[str, Any]:
        """The numbers of a group, made anew where it has changed."""
        version = self._asked.versions[group]
        if group not in self._numbers or self._numbers[group][0] != version:
            self._numbers[group] = version, numbers_of(self._recipes[group], self._asked.groups[group])
        return self._numbers[group][1]

    def _distinct(self) -> tuple[list[Any], Array]:
        """The distinct (group, step, ...) that occur, a row each, and which of them each slot has."""
        history = [self._taken.read() + 1]
        if self._product is not None:
            history.append(self._product.read())
        if all(h.size and h.min() == h.max() for h in history):  # the usual case: a group is a row
            found = np.stack([x[self._firsts] for x in (self._groups, *history)], axis=1)
            rows = self._of_slots
        else:
            columns = np.stack([self._groups, *history], axis=1)
            found, rows = np.unique(columns, axis=0, return_inverse=True)
        return [(int(group), *numbers) for group, *numbers in found.tolist()], rows.reshape(-1)

    def ready(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """Measures where that is asked for, and makes all ready to be launched; returns whether to step."""
        skip = found_inf is not None and bool(number_of(found_inf) != 0)
        scale = 1.0 if grad_scale is None else float(number_of(grad_scale))
        norm = 0.0
        if self._needs.measure:
            norm = math.sqrt(self._squares()) / scale
            skip = skip or (self._needs.check and not norm < math.inf)
        if not skip:
            if self._needs.scaled:
                self._write(norm, scale)
            prepare(self._buckets)
        if self._needs.measure:
            self._report[0] = norm
        if skip:
            self._report[1] += 1
        return not skip

    def decide(self) -> int:
        """All is decided; returns the number of kernel launches that took."""
        return 0

    def _squares(self) -> float:
        """Sum of the squares of all gradients, each element once; over the ranks where they are spread."""
        total = 0.0
        for mesh in (None, *self._meshes):
            squares = sum(
                (b.key.executor.squares(b) / b.key.copies for b in self._buckets if b.key.mesh == mesh), 0.0
            )
            if mesh is not None:
                device = torch.device(mesh.device_type)
                squares = summed(torch.tensor(squares, dtype=torch.float64, device=device), mesh).item()
            total += squares
        return total

    def parted_by(self, live: list[bool]) -> bool:
        """Nothing is counted as one here for good: rows are found anew where counts differ."""
        return False

    def advance(self) -> None:
        """Counts a step."""
        self._taken.count(self._most)
        if self._product is not None:
            self._product.write(self._new_products[self._rows])
        else:
            self._expected = self._taken.note()
            self._found = [(group, fp32(step + 1)) for group, step in self._found]


class HostCounts:
    """A number of each slot of a plan: of those whose entry has it, in the optimizer's buffer.

    Args:
        counters: the optimizer's.
        name: of the state.
        entries: of each slot; {} where it keeps no count, and only its first step is told from later ones.
        everyone: the entries of all parameters.
        room: how many those may become.
        own: fp32 [slots], where those begin that keep none.
    """

    def __init__(
        self,
        counters: Counters,
        name: str,
        entries: Entries,
        everyone: Iterable[dict[str, Any]],
        room: int,
        own: Array,
    ) -> None:
        self._kept = np.array([bool(entry) for entry in entries], dtype=bool)
        self._own = own
        kept = [entry for entry in entries if entry]
        self._shared, self._places = torch.empty(0), np.empty(0, dtype=np.int64)
        self._whole = len(kept) == len(entries)  # and they lie one after the other
        if kept:
            buffer, places = counters.on_host(name, kept, everyone, room)
            first, count = int(places[0]), len(places)
            if np.array_equal(places, np.arange(first, first + count)):
                buffer, places = buffer[first : first + count], np.arange(count)
            else:
                self._whole = False
            self._shared, self._places = buffer, places
        self._seen: Array = self._shared.numpy()

    def read(self) -> Array:
        """The numbers as they are now."""
        if self._whole:
            return self._seen
        self._own[self._kept] = self._seen[self._places]
        return self._own

    def write(self, values: Array) -> None:
        """Takes over new ones."""
        if self._whole:
            self._shared.copy_(torch.from_numpy(values))
            return
        np.copyto(self._own, values)
        if len(self._places):
            self._shared[torch.from_numpy(self._places)] = torch.from_numpy(values[self._kept])

    def count(self, most: Array) -> None:
        """Adds one to each, up to so many."""
        if self._whole:
            self._shared.add_(1)  # none of them ends
        else:
            self.write(np.minimum(self.read() + 1, most))

    def note(self) -> bytes | None:
        """What they are, to be compared at the next step in one look; None where that is not enough."""
        return self._seen.tobytes() if self._whole else None
