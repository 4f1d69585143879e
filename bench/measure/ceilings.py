"""The machine's own limit, in the same run: how fast memory moves when nothing else is done.

Two streams: a copy (1 read, 1 write) and one with AdamW's traffic (4 reads, 3 writes), in decimal
GB/s of all bytes moved. An optimizer step is judged as a share of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..env import machine
from .timing import Step, device_sampler, wall_sampler

GPU_ELEMENTS = 2**28  # 1 GiB of float32 each
CPU_ELEMENTS = 25 * 2**20  # 700 MiB of traffic: over the last-level caches that a task can use


def measure(device: torch.device, samples: int = 15) -> dict[str, Any]:
    """`copy_gbs` and `stream_4r3w_gbs` (None where no such stream runs) and how they were made."""
    count = GPU_ELEMENTS if machine.on_gpu(device) else CPU_ELEMENTS
    try:
        stream, how = stream_of(device, count, 4), f"{device.type} 4-read-3-write stream"
    except ImportError as error:
        # A proxy with other traffic would be another ceiling: rather none.
        stream, how = None, f"no 4-read-3-write stream without {error.name}"
    source, target = (torch.ones(count, device=device) for _ in range(2))

    def bandwidth(step: Step, streams: int) -> float:
        for _ in range(3):
            step()
        sampler = wall_sampler(step, device)
        if machine.on_gpu(device):
            sampler = device_sampler(step, device, sleep_seconds=2e-3, repeat=5, flush=False)
        seconds = float(np.median([sampler() for _ in range(samples)]))
        return streams * 4 * count / seconds * 1e-9

    return {
        "copy_gbs": bandwidth(lambda: target.copy_(source), 2),
        "stream_4r3w_gbs": bandwidth(stream, 7) if stream is not None else None,
        "how": how,
    }


def stream_of(device: torch.device, count: int, reads: int) -> Step:
    """A step with the traffic of an optimizer on `count` fp32 parameters, checked once.

    It reads so many arrays (parameter, gradient and states) and writes all but one of them.

    Raises:
        ImportError: there is no Triton on a GPU, or no numba on a CPU.
    """
    run: Callable[..., None]
    if machine.on_gpu(device):
        from .stream_triton import BLOCK
        from .stream_triton import stream as run

        count = math.ceil(count / BLOCK) * BLOCK
    else:
        from .stream_numba import stream as run
    arrays = [torch.full((count,), float(value), device=device) for value in range(reads)]
    run(*arrays)
    _check(arrays)
    return lambda: run(*arrays)


def _check(arrays: list[torch.Tensor]) -> None:
    """A stream that moved less than it says would set a false ceiling."""
    last = len(arrays) - 1
    for array in arrays:
        wanted = torch.tensor(float(last) if array is arrays[-1] else last / 2)  # the mean of 0 to last
        if not torch.allclose(array.cpu(), wanted, rtol=1e-6):
            raise RuntimeError(f"the stream of {last + 1} reads and {last} writes computed a wrong result")
