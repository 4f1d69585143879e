"""Arrays of the host kept on a device, where kernels and captured graphs read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]


def capturing() -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Mirror:
    """An array's copy on a device, at one address for good: a captured graph goes on reading it there.

    Copies are queued behind the work of the current stream: the host does not wait. One that is captured is
    made anew at each replay, so what it reads on the host is set apart for it. Memory for that is taken
    beforehand, for none may be while a graph is captured.
    """

    def __init__(self, device: torch.device, values: Array) -> None:
        self.host = values
        self.tensor = torch.empty(values.shape, dtype=torch.from_numpy(values[:0]).dtype, device=device)
        self._captured: list[Tensor] = []
        self._spare: Tensor | None = None
        self._send()

    def update(self, values: Array) -> None:
        """Takes over the values, if they are other ones."""
        if not np.array_equal(values, self.host):
            self.host = values.copy()
            self._send()

    def _send(self) -> None:
        host = torch.from_numpy(np.ascontiguousarray(self.host))
        if self.tensor.device.type != "cuda":
            self.tensor.copy_(host)
        elif not capturing():
            self.tensor.copy_(host.pin_memory(), non_blocking=True)
        else:
            if self._spare is None:
                raise RuntimeError("run a step that is not captured before one is captured, and between two")
            self.tensor.copy_(self._spare.copy_(host), non_blocking=True)
            self._captured.append(self._spare)
            self._spare = None

    def prepare_capture(self) -> None:
        """Takes the memory that a captured update needs."""
        if self._spare is None and self.tensor.device.type == "cuda":
            self._spare = torch.from_numpy(np.ascontiguousarray(self.host)).pin_memory()
