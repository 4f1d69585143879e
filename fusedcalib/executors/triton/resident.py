"""Arrays of the host kept on a device, where kernels and captured graphs read them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]


def capturing() -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized() and cuda.is_current_stream_capturing())


def _event() -> Any:
    cuda: Any = torch.cuda
    return cuda.Event()


def sent(device: torch.device, values: Array) -> Tensor:
    """A copy on the device, queued behind the work of the current stream: the host does not wait."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)


class Streams:
    """Tells the allocator which streams read a plan's tensors.

    Memory goes back to the stream on which it was taken. Without this a plan that is dropped would give it
    away while a step on another stream still reads it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen = {self._current()}

    def _current(self) -> Any:
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

    def note(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """To be called where they are going to be read on the current stream."""
        stream = self._current()
        if stream not in self._seen:
            self._seen.add(stream)
            for tensor in tensors():
                tensor.record_stream(stream)


class _Pinned(NamedTuple):
    """Memory that a device copies from: as NumPy sees it, and the event that says when the copy is made."""

    buffer: Tensor
    view: Array
    copied: Any


class DeviceArray:
    """An array's copy on a device, at one address for good.

    Copies are queued behind the work of the current stream, from pinned buffers that take turns: the host
    neither waits nor allocates. What a captured graph reads is its own: a copy that is made anew at each
    replay, into memory that no later step writes. That memory is taken beforehand, for none may be while a
    graph is captured.

    Attributes:
        host: what lies on the device, or is on its way there.
        tensor: where it lies.
    """

    def __init__(self, device: torch.device, values: Array) -> None:
        self.host = np.empty_like(values)
        self.tensor = self._empty(device)
        self._ring: deque[_Pinned] = deque()
        self._spare: tuple[Tensor, Tensor] | None = None
        self._captured: list[tuple[Tensor, Tensor]] = []
        self._send(values)

    def _empty(self, device: torch.device, **options: Any) -> Tensor:
        dtype = torch.from_numpy(self.host[:0]).dtype
        return torch.empty(self.host.shape, dtype=dtype, device=device, **options)

    def update(self, values: Array) -> None:
        """Takes over the values, if they are other ones."""
        if not np.array_equal(values, self.host):
            self._send(values)

    def _send(self, values: Array) -> None:
        if self.tensor.device.type != "cuda":
            self.tensor.copy_(torch.from_numpy(values))
        else:
            self._send_pinned(values)
        np.copyto(self.host, values)  # only now: what could not be sent is sent the next time

    def _send_pinned(self, values: Array) -> None:
        if self._ring and self._ring[0].copied.query():
            pinned = self._ring.popleft()
        else:  # as at first, and where the device is far behind
            buffer = self._empty(torch.device("cpu"), pin_memory=True)
            pinned = _Pinned(buffer, buffer.numpy(), _event())
        np.copyto(pinned.view, values)
        self.tensor.copy_(pinned.buffer, non_blocking=True)
        pinned.copied.record(torch.cuda.current_stream(self.tensor.device))
        self._ring.append(pinned)

    def captured(self, values: Array) -> Tensor:
        """A copy for the graph that is being captured, and for it alone.

        Raises:
            RuntimeError: `prepare_capture` has not been called since the last one.
        """
        if self._spare is None:
            raise RuntimeError("run a step that is not captured before one is captured, and between two")
        buffer, tensor = self._spare
        self._spare = None
        buffer.copy_(torch.from_numpy(values))
        tensor.copy_(buffer, non_blocking=True)
        self._captured.append((buffer, tensor))
        return tensor

    def prepare_capture(self) -> None:
        """Takes the memory that a captured copy needs."""
        if self._spare is None:
            on_gpu = self.tensor.device.type == "cuda"
            buffer = self._empty(torch.device("cpu"), pin_memory=on_gpu)
            self._spare = buffer, self._empty(self.tensor.device)
