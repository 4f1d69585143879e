"""Rows that lie on several ranks: two halves, side by side in one process, step as the whole does."""

from typing import Any

import pytest
import torch
from kernel_cases import FUSED, device_of

import fusedcalib
from fusedcalib import GradientNoise, WeightNoise
from fusedcalib.executors.choose import choose
from fusedcalib.layout.buckets import Slot
from fusedcalib.layout.recipe import needs_of, recipe_of
from fusedcalib.layout.scalars import Scalars, scalars_of
from fusedcalib.layout.shards import Place
from fusedcalib.layout.split_rows import RowTotals
from fusedcalib.layout.tables import build_buckets
from fusedcalib.noise import words_of

ROWS, COLUMNS = 3, 1068
CUTS = {"unaligned, longer than a tile": 1025, "aligned": 64}
CASES: dict[str, dict[str, Any]] = {
    "centred": {"centralize": True, "weight_decay": 0.1},
    "update": {"centralize": "update"},
    "projected": {"max_row_norm": 20.0, "ema_decay": 0.9},
    "all": {"centralize": True, "max_row_norm": 20.0, "ema_decay": 0.9, "noise": WeightNoise(0.1)},
    "noise": {"centralize": True, "noise": GradientNoise(0.5)},
}
# What has to be compiled or interpreted: all stages, and the mean of an update.
PAIRS = [("eager", case) for case in CASES]
PAIRS += [pytest.param(*b.values, case, marks=b.marks) for b in FUSED for case in ("update", "all")]


def halves(whole: torch.Tensor, cut: int) -> list[torch.Tensor]:
    return [part.contiguous() for part in torch.split(whole, [cut, COLUMNS - cut], dim=1)]


class Rank:
    """What one of two ranks has of a parameter, and its part of a step."""

    def __init__(self, backend: str, optimizer: Any, place: Place, *tensors: torch.Tensor) -> None:
        p, g, *states = (t.to(device_of(backend)) for t in tensors)
        self.param = torch.nn.Parameter(p)
        self.param.grad = g
        self.states = tuple(states)
        (group,) = optimizer.param_groups
        recipe = recipe_of(optimizer.rule, group, needs_of([group], None, None))
        executor = choose(backend, self.param.device, self.param.dtype)
        slot = Slot(self.param, self.states, 0, recipe, executor, words_of(group["seed"], None, 0), place)
        scalars = Scalars()
        scalars.set([scalars_of(recipe, group, 1.0)])
        self.totals = RowTotals([slot])
        (self.bucket,) = build_buckets([slot], scalars, totals=self.totals.parts)

    def run(self, part: str) -> torch.Tensor:
        """Runs it; the totals of the rows."""
        self.bucket.key.executor.prepare([self.bucket])
        self.bucket.key.executor.step_bucket(self.bucket, part)
        (part_of_rows,) = self.bucket.totals
        return part_of_rows


def added_up(ranks: list[Rank], part: str) -> None:
    totals = [rank.run(part) for rank in ranks]
    both = sum(totals)
    for total in totals:
        total.copy_(both)


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_two_halves_step_as_the_whole(backend: str, case: str, cut: int):
    """To roundings of fp32: sums of 1068 numbers of size 1 in another order, and what they enter.

    The root of n of them, 33, times half a unit is a mean's error of 2e-9 at most; of the norm it is one of
    20 times 2e-6. A first step of Adam is near the sign of the gradient: of slope below 1 / eps = 10.
    """
    torch.manual_seed(0)
    p, g = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS) + 0.3
    whole = torch.nn.Parameter(p.clone())
    whole.grad = g.clone()
    expected = fusedcalib.Adam([whole], lr=0.1, eps=0.1, backend="eager", **CASES[case])
    expected.step()
    names = [name for name in ("ema", "exp_avg", "exp_avg_sq") if name in expected.state[whole]]
    starts = [p if name == "ema" else torch.zeros_like(p) for name in names]
    offsets, ranks = (0, cut), []
    for offset, *tensors in zip(offsets, *(halves(t, cut) for t in (p, g, *starts)), strict=True):
        place = Place(offset, COLUMNS, mesh="both", across=(0,))
        ranks.append(Rank(backend, expected, place, *tensors))
    flags = ranks[0].bucket.key.recipe.flags
    if ranks[0].totals.centred:
        added_up(ranks, "sums")
    (added_up if flags.project else lambda ranks, part: [rank.run(part) for rank in ranks])(ranks, "step")
    for rank in ranks:
        rank.run("finish")
    found = [torch.cat([rank.param.detach().cpu() for rank in ranks], dim=1)]
    found += [torch.cat([rank.states[i].cpu() for rank in ranks], dim=1) for i in range(len(names))]
    for t, other in zip(
        found, [whole.detach(), *(expected.state[whole][name] for name in names)], strict=True
    ):
        torch.testing.assert_close(t, other, rtol=0, atol=5e-6)
