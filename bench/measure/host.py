"""Host time of a step: what Python and the launches cost when the arithmetic costs next to nothing.

On a GPU the step is queued behind a sleeping kernel, so that it returns without waiting. On a CPU
the arithmetic cannot be left out, so the tensors have one element each; `work_us` is fusedcalib's step
without its loops, which is all of its host work but the launches, beside torch's whole fused step.

python3 bench/run.py host [--out FILE] [--each]
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from ..env import machine
from ..models import shapes
from ..report import tables
from ..report.data import made, write
from ..report.records import HostCase, HostRow, HostTimes
from . import timing
from .baselines import METHODS
from .timing import Rounds, Sampler, Step, host_seconds, interleave, wall_sampler

if TYPE_CHECKING:
    from fusedcalib.options import Backend

TENSORS = 1000
COMPARED = ("torch_fused", "own_plain", "own_gc")
# Gradients at the same addresses; at others in each step, as zero_grad(set_to_none) makes them; at each step
# of a set of parameters that has not been stepped before, as of experts, which is then laid out anew.
VARIANTS = ("unchanged", "reallocated", "of a new set")


def measure(device: torch.device, rounds: int = 30, seconds: float = 6.0) -> list[HostCase]:
    """Host microseconds and ratios to torch fused for each variant."""
    shape = (1024,) if machine.on_gpu(device) else (1,)
    spec = shapes.ParamList(f"{TENSORS}x{shape[0]}", (shape,) * TENSORS)
    out = []
    for variant in VARIANTS:
        samplers: dict[str, Sampler] = {}
        for name in COMPARED:
            params = shapes.build(spec, device)
            shapes.load_gradients(spec, [params], 0)
            built = METHODS[name].make(spec, params)
            for _ in range(5):
                built.step()
            turn = others(params) if variant == VARIANTS[2] else turns(params, moving=variant == VARIANTS[1])
            samplers[name] = _after(turn, built.step, device)
            if name.startswith("own") and not machine.on_gpu(device):
                samplers[f"{name} work"] = _without_loops(turn, built.step)
        timed = interleave(samplers, rounds=rounds, seconds=seconds)
        out.append(HostCase(spec.name, variant, [_row(timed, name) for name in COMPARED]))
    return out


def _row(timed: Rounds, name: str) -> HostRow:
    """Microseconds of a step and of its host work alone, and their ratios to torch's whole step."""

    def microseconds(name: str) -> float | None:
        spread = timed.time(name)
        return 1e6 * spread.median if spread else None

    work, ratio = f"{name} work", timed.ratio(name, COMPARED[0])
    ratios = {COMPARED[0]: ratio} if ratio and name != COMPARED[0] else {}
    return HostRow(name, microseconds(name), ratios, microseconds(work), timed.ratio(work, COMPARED[0]))


def turns(params: list[Tensor], moving: bool) -> Step:
    """What happens before each step: nothing, or all gradients change their addresses."""
    sets: list[list[Tensor | None]] = [[param.grad for param in params]]
    sets.append([torch.ones_like(param) for param in params])

    def swap() -> None:
        sets.reverse()
        for param, grad in zip(params, sets[0], strict=True):
            param.grad = grad

    return swap if moving else lambda: None


def others(params: list[Tensor]) -> Step:
    """What happens before each step: another parameter than before has no gradient."""
    grads, missing = [param.grad for param in params], itertools.cycle(range(len(params)))

    def leave_out() -> None:
        left_out = next(missing)
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            param.grad = None if i == left_out else grad

    return leave_out


def _after(turn: Step, step: Step, device: torch.device) -> Sampler:
    """Time `step` alone, after an untimed `turn`."""
    if not machine.on_gpu(device):
        return wall_sampler(step, device, fresh=turn)

    def sample() -> float:
        turn()
        return host_seconds(device, step, repeats=1)

    return sample


def _without_loops(turn: Step, step: Step) -> Sampler:
    """Time `step` after an untimed `turn`, less what its compiled loops take."""

    def sample() -> float:
        import fusedcalib.executors.numba.run

        cpu: Any = fusedcalib.executors.numba.run
        on_threads, spent = cpu.on_threads, 0.0

        def timed(*args: Any) -> None:
            nonlocal spent
            start = time.perf_counter()
            on_threads(*args)
            spent += time.perf_counter() - start

        turn()
        with mock.patch.object(cpu, "on_threads", timed):
            start = time.perf_counter()
            step()
            return time.perf_counter() - start - spent

    return sample


def each_tensor(rounds: int = 40, backend: Backend = "auto") -> dict[str, float]:
    """Median seconds of the host for each tensor, of one element, gradients new at each step; in turns.

    own: our step up to its launches. torch: its fused AdamW with its kernel taken out.
    """
    import fusedcalib

    spec = shapes.ParamList(f"{TENSORS}x1", ((1,),) * TENSORS)
    device = torch.device("cpu")
    own, theirs = (shapes.build(spec, device) for _ in range(2))
    shapes.load_gradients(spec, [own, theirs], 0)
    ours, torchs = fusedcalib.AdamW(own, backend=backend), torch.optim.AdamW(theirs, fused=True)
    steps: dict[str, tuple[list[torch.Tensor], Step]] = {
        "own": (own, torch.no_grad()(lambda: ours._engine.prepare(ours.param_groups, ours.state))),
        "torch": (theirs, torchs.step),
    }
    samplers = {
        name: wall_sampler(step, device, fresh=turns(params, moving=True))
        for name, (params, step) in steps.items()
    }
    for optimizer in (ours, torchs):
        optimizer.step()
    with mock.patch.object(torch, "_fused_adamw_"), timing.one_thread():
        timed = interleave(samplers, rounds=rounds, seconds=float("inf"))
    return {name: spread.median / TENSORS for name in samplers if (spread := timed.time(name))}


def kept(slug: str) -> HostTimes | None:
    """What was measured on such a device and kept, if it was."""
    path = machine.RESULTS / "host" / f"{slug}.json"
    return made(HostTimes, json.loads(path.read_text("utf-8")), str(path)) if path.exists() else None


def lines(measured: list[HostCase]) -> list[str]:
    """A sentence for each variant: the whole step, and what of it is neither loop nor launch."""
    found = []
    for case in measured:
        for row in case.methods:
            if row.name == "own_plain" and (ratio := row.ratio_to.get(COMPARED[0])):
                of_which = f", without its loops {tables.spread_text(row.work_to)}" if row.work_to else ""
                share = f"{tables.spread_text(ratio)} of torch's fused step{of_which}"
                found.append(f"gradients {case.variant}: {share}")
    return found


def main(options: argparse.Namespace) -> int:
    if options.each:
        for name, seconds in each_tensor().items():
            print(f"{name}: {1e6 * seconds:.2f} us for each tensor")
        return 0
    device = machine.pick_device("auto")
    with timing.one_thread():
        head = vars(machine.describe(device))
        results = HostTimes(**head, host=measure(device, rounds=100, seconds=60))
    print("\n".join([results.measured_on, *lines(results.host)]))
    write(results, options.out)
    return 0
