"""What the host does for each tensor, without any kernel: where plan_costs.py has its numbers from.

python -m fusedcalib.bench.plan_host
"""

from __future__ import annotations

from statistics import median
from unittest import mock

import torch

import fusedcalib

from . import shapes
from .host import TENSORS, turns
from .timing import Sampler, Step, one_thread, wall_sampler

ROUNDS = 40


def measure(rounds: int = ROUNDS, backend: str = "auto") -> dict[str, float]:
    """Median seconds for each tensor, of one element, all gradients new at each step; the two take turns.

    own: our step up to its launches. torch: its fused AdamW with its kernel taken out.
    """
    spec = shapes.ParamList(f"{TENSORS}x1", ((1,),) * TENSORS)
    device = torch.device("cpu")
    own, theirs = (shapes.build(spec, device) for _ in range(2))
    shapes.load_gradients(spec, [own, theirs], 0)
    ours, torchs = fusedcalib.AdamW(own, backend=backend), torch.optim.AdamW(theirs, fused=True)
    steps: dict[str, tuple[list[torch.Tensor], Step]] = {
        "own": (own, torch.no_grad()(lambda: ours._engine.prepare(ours.param_groups, ours.state))),
        "torch": (theirs, torchs.step),
    }
    samplers: dict[str, Sampler] = {}
    for name, (params, step) in steps.items():
        samplers[name] = wall_sampler(step, device, fresh=turns(params, moving=True))
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    for optimizer in (ours, torchs):
        optimizer.step()
    with mock.patch.object(torch, "_fused_adamw_"), one_thread():
        for _ in range(rounds):
            for name, sample in samplers.items():
                taken[name].append(sample() / TENSORS)
    return {name: median(times) for name, times in taken.items()}


if __name__ == "__main__":
    for name, seconds in measure().items():
        print(f"{name}: {1e6 * seconds:.2f} us for each tensor")
