"""Times a step of every rule, and the host's work, for developers.

pytest bench/speed

docs/benchmarks.md says how a baseline is kept and compared with. With --benchmark-disable each step is taken
once. The folder is its own, so that pytest does not put bench/ before the standard library.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedcalib.bench.env import machine
from fusedcalib.bench.measure import host
from fusedcalib.bench.measure.baselines import METHODS
from fusedcalib.bench.measure.method import SUBJECTS
from fusedcalib.bench.measure.timing import Step
from fusedcalib.bench.models import shapes

DEVICE = machine.pick_device()
SPEC = shapes.ParamList("speed", shapes.SMALL_SET * 10)
TENSORS = shapes.ParamList("1000x1", ((1,),) * 1000)


def waiting(step: Step) -> Step:
    """A step that also waits for the device's work."""

    def work() -> None:
        step()
        machine.synchronize(DEVICE)

    return work


def made(spec: shapes.ParamList, method: str, subject: str = "AdamW") -> tuple[list[torch.Tensor], Any]:
    params = shapes.build(spec, DEVICE)
    shapes.load_gradients(spec, [params], 0)
    built = METHODS[method].make(spec, params, SUBJECTS[subject])
    built.step()
    return params, built


@pytest.mark.parametrize("method", ["own_plain", "own_chain"], ids=["plain", "everything"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_step(benchmark: Any, subject: str, method: str) -> None:
    """`everything`: clip, noise, centring and the average."""
    benchmark(waiting(made(SPEC, method, subject)[1].step))


@pytest.mark.parametrize("variant", host.VARIANTS)
def test_host(benchmark: Any, variant: str) -> None:
    """What comes before the launches of a step over 1000 tensors."""
    params, built = made(TENSORS, "own_plain")
    turn = host.turns(params, moving=variant == "reallocated")
    engine, optimizer = built.optimizer._engine, built.optimizer
    prepare = torch.no_grad()(lambda: engine.prepare(optimizer.param_groups, optimizer.state))
    benchmark.pedantic(waiting(prepare), setup=turn, rounds=50, warmup_rounds=5)
