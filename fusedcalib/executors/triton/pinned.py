"""Pinned host memory, where states lie that are offloaded: all of it that depends on the device.

With unified addressing an address of pinned memory is valid on the device, so kernels read and write such
states through the same table as any other; nothing is copied. What is different: the host's memory knows no
order of streams. So the host waits before it reads what kernels write (`wait`), and the allocator is told
which streams use a state, or it would give the memory away while a step still reads it (`Users`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .resident import capturing

# Of CUDA's driver and of HIP: what an address is on the device, and the answer that it is none there.
_DEVICE_POINTER, _NONE = 3, 1
_cuda: Any = torch.cuda


def available() -> bool:
    """Whether there is a GPU that could reach it."""
    return bool(_cuda.is_available())


@cache
def why_not(device: torch.device) -> str | None:
    """Why kernels on a device cannot reach it; None if they can."""
    if device.type != "cuda":
        return f"needs parameters on a GPU, but one is on {device}"
    with torch.cuda.device(device):
        there = _device_address(torch.empty(1, pin_memory=True).data_ptr())
    return None if there else f"needs unified addressing, which {device} does not have"


def _device_address(address: int) -> bool:
    """Whether the driver has the same address for the device; where it says nothing that counts as yes."""
    name, function = (
        ("libamdhip64.so", "hipPointerGetAttribute")
        if torch.version.hip
        else ("libcuda.so.1", "cuPointerGetAttribute")
    )
    found = ctypes.c_void_p()
    try:
        ask = getattr(ctypes.CDLL(name), function)
    except (AttributeError, OSError):
        return True  # every GPU that Triton supports has it
    code = ask(ctypes.byref(found), _DEVICE_POINTER, ctypes.c_void_p(address))
    return bool(found.value == address if code == 0 else code != _NONE)


def is_pinned(t: Tensor) -> bool:
    """Whether a tensor lies in it; one without elements lies anywhere."""
    return t.device.type == "cpu" and (t.numel() == 0 or t.is_pinned())


def memory(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Pinned memory for a tensor of that shape and those strides, not filled.

    Raises:
        RuntimeError: the host has no more that can be pinned.
    """
    try:
        return torch.empty_like(t, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"offload='states': {t.numel() * dtype.itemsize} bytes of the host's memory cannot be pinned "
            f"({str(error).splitlines()[0]}); state_dtype='8bit' needs less, more ranks share it"
        ) from error


def moved(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor in pinned memory: itself where it lies there, in this dtype."""
    dtype = dtype or t.dtype
    if is_pinned(t) and t.dtype == dtype:
        return t
    return memory(t, dtype).copy_(t)  # waits for the device that has it


def wait(devices: Iterable[torch.device]) -> None:
    """Waits until all is done that devices have been given: then the host may read what kernels write."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def streams_of(device: torch.device) -> set[Any]:
    """The streams on which kernels launched now, and graphs replayed later, run as a rule."""
    return {torch.cuda.current_stream(device), torch.cuda.default_stream(device)}


def use(t: Tensor, device: torch.device, stream: Any) -> None:
    """Tells the allocator that a stream uses a tensor's memory: as every copy does, here one of one element.

    When the tensor is freed the allocator records an event on that stream, and waits for it before it gives
    the memory away (`record_stream` is of device memory only).
    """
    with torch.cuda.stream(stream):
        t.as_strided((1,), (1,)).to(device, non_blocking=True)


class Users:
    """Tells the allocator which streams use the pinned states of some launches on a device."""

    def __init__(self, device: torch.device, tensors: Iterable[Tensor]) -> None:
        self._device = device
        self._tensors = [t for t in tensors if t.numel() and is_pinned(t)]
        self._seen: set[Any] = set()

    def note(self) -> None:
        """To be called before they are used on the current stream."""
        if not self._tensors or capturing():  # a graph that is captured uses nothing yet
            return
        for stream in streams_of(self._device) - self._seen:
            for t in self._tensors:
                use(t, self._device, stream)
            self._seen.add(stream)
