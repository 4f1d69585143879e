"""A stand-in for pinned memory where there is no GPU: what fusedcalib/executors/triton/pinned.py asks of one.

What it has handed out is pinned. It writes down what it is told; where there is a GPU it does nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from kernel_cases import GPU, device_of
from torch import Tensor

import fusedcalib
from fusedcalib.executors.triton import pinned

DEVICE = device_of("triton")
COUNTS = ("step", "mu_product")


class Host:
    """Events are ("memory", dtype), ("use", address, stream) and ("wait",)."""

    def __init__(self, patch: Any) -> None:
        self._storages: dict[int, Any] = {}  # for good: no address comes twice
        self._real = pinned.memory, pinned.use, pinned.wait
        self.events: list[tuple[Any, ...]] = []
        self.streams = {"default"}
        if not GPU:
            patch.setattr(pinned, "available", lambda: True)
            patch.setattr(pinned, "why_not", lambda device: None)
            patch.setattr(pinned, "is_pinned", lambda t: t.numel() == 0 or self.has(t))
            patch.setattr(pinned, "streams_of", lambda device: set(self.streams))
        for name in ("memory", "use", "wait"):
            patch.setattr(pinned, name, getattr(self, name))

    def has(self, t: Tensor) -> bool:
        return t.untyped_storage().data_ptr() in self._storages

    def memory(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        self.events.append(("memory", dtype))
        made = self._real[0](t, dtype) if GPU else torch.empty_like(t, dtype=dtype)
        storage = made.untyped_storage()
        self._storages[storage.data_ptr()] = storage
        return made

    def use(self, t: Tensor, device: torch.device, stream: Any) -> None:
        self.events.append(("use", t.data_ptr(), stream))
        if GPU:
            self._real[1](t, device, stream)

    def wait(self, devices: Any) -> None:
        self.events.append(("wait",))
        self._real[2](devices)

    def told(self, kind: str) -> list[tuple[Any, ...]]:
        """What of a kind has been written down since it was last asked."""
        found = [event for event in self.events if event[0] == kind]
        self.events.clear()
        return found


def on_device(params: Any) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().to(DEVICE, copy=True)) for p in params]


def made(params: Any, cls: str = "AdamW", **options: Any) -> Any:
    options = {"lr": 0.01, "backend": "triton", "offload": "states", **options}
    return getattr(fusedcalib, cls)(params, **options)


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All of its states but those that count."""
    entries = [optimizer.state.get(p, {}) for p in params_of(optimizer)]
    return [t for entry in entries for name, t in entry.items() if name not in COUNTS]


def train(optimizer: torch.optim.Optimizer, *numbers: int) -> None:
    """Steps whose gradients depend on their number only."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for p in params_of(optimizer):
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step()


def values(optimizer: Any) -> Any:
    """Parameters and what a checkpoint would have, copied to the CPU."""
    entries = optimizer.state_dict()["state"]
    states = {i: {k: v.cpu().clone() for k, v in entry.items()} for i, entry in entries.items()}
    return [p.detach().cpu().clone() for p in params_of(optimizer)], states


def assert_same(one: Any, other: Any) -> None:
    """The same parameters, keys and states, to the last bit, wherever they lie."""
    torch.testing.assert_close(values(one), values(other), rtol=0, atol=0, equal_nan=True)


def assert_on_host(optimizer: Any) -> None:
    """Parameters on the device, all states in pinned memory."""
    assert {p.device.type for p in params_of(optimizer)} == {DEVICE}
    assert states_of(optimizer)
    assert all(map(pinned.is_pinned, states_of(optimizer)))
