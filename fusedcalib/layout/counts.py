"""Counts of steps, and running products: 0-dim states of parameters, for every plan of an optimizer at once.

Each `state["step"]` is a 0-dim tensor of its own, as torch.optim's. On the host all are views of one buffer:
counting a step is one addition whatever the number of parameters. On a device a kernel finds each by its
address: one that lies there already stays where it is, so that captured graphs go on counting it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
Entries = Sequence[dict[str, Any]]


def values_of(counters: Sequence[Any]) -> Array:
    """The values, fp32, of 0-dim tensors and numbers: one copy from each device that has some."""
    values = np.empty(len(counters), dtype=np.float32)
    remote: dict[torch.device, list[int]] = {}
    for i, counter in enumerate(counters):
        if isinstance(counter, Tensor) and counter.device.type != "cpu":
            remote.setdefault(counter.device, []).append(i)
        else:
            values[i] = counter
    for indices in remote.values():
        found = torch.stack([counters[i].to(torch.float32).reshape(()) for i in indices])
        values[indices] = found.cpu().numpy()
    return values


class Counters:
    """Where the counters of an optimizer lie on the host."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[str, list[Tensor]] = {}
        self._places: dict[str, dict[int, int]] = {}  # of a view, by its identity
        self._private: dict[Tensor, dict[str, Any]] = {}

    def private(self, param: Tensor, begins: bool) -> dict[str, Any]:
        """Counters on a device of a parameter whose state has none: whether its first step has been taken.

        The state has the same keys wherever a step is decided. Of one left out only the device knows.
        """
        if begins:
            self._private.pop(param, None)
        return self._private.setdefault(param, {})

    def on_host(
        self, name: str, entries: Entries, everyone: Iterable[dict[str, Any]], room: int
    ) -> tuple[Tensor, Array]:
        """A buffer, and the places in it of the counters of some entries.

        One that lies elsewhere takes the next free place. Where there are none left, as after loading, those
        of all entries move into a new buffer, with room for at least so many.
        """
        places, buffer = self._places.get(name, {}), self._buffers.get(name, torch.empty(0))
        moving = [entry for entry in entries if id(entry[name]) not in places]
        if len(places) + len(moving) > len(buffer):
            moving, places = [entry for entry in everyone if name in entry], {}
            buffer = torch.zeros(max(room, len(moving)), dtype=torch.float32, device="cpu")
            self._buffers[name], self._places[name] = buffer, places
            self._views[name] = list(buffer.unbind())
        if moving:
            first = len(places)
            values = torch.from_numpy(values_of([entry[name] for entry in moving]))
            buffer[first : first + len(moving)] = values
            for place, entry in enumerate(moving, first):
                entry[name] = view = self._views[name][place]
                places[id(view)] = place
        return buffer, np.array([places[id(entry[name])] for entry in entries], dtype=np.int64)


def on_device(
    name: str,
    entries: Entries,
    own: Array,
    device: torch.device,
    send: Callable[[torch.device, Array], Tensor],
) -> list[Tensor]:
    """The counters of slots, fp32 0-dim there; those that lie elsewhere move, missing ones begin as `own`."""
    found: list[Any] = [entry.get(name) for entry in entries]
    moved = [i for i, t in enumerate(found) if not _lies_on(t, device)]
    if moved:
        begun = [i for i in moved if found[i] is not None]
        values = np.array(own, dtype=np.float32)
        values[begun] = values_of([found[i] for i in begun])
        for i, view in zip(moved, send(device, values[moved]).unbind(), strict=True):
            found[i] = entries[i][name] = view
    return found


def _lies_on(counter: Any, device: torch.device) -> bool:
    return (
        isinstance(counter, Tensor)
        and counter.device == device
        and counter.dtype == torch.float32
        and counter.ndim == 0
    )
