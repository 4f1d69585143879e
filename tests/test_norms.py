"""Factors by norms of whole tensors: LAMB, LARS, StableAdamW, however a tensor is cut, grouped and kept."""

import math
from typing import Any

import pytest
import torch
from kernel_cases import BACKENDS, FUSED, device_of
from kernel_trial import bits
from rule_cases import each

import fusedcalib
from fusedcalib.executors.choose import choose
from fusedcalib.layout.buckets import Slot
from fusedcalib.layout.recipe import recipe_of
from fusedcalib.layout.scalars import Scalars, scalars_of
from fusedcalib.layout.shards import Place
from fusedcalib.layout.split_rows import TensorTotals
from fusedcalib.layout.tables import build_buckets
from fusedcalib.reference import ORACLES

NORMED = ["LAMB", "LARS", "StableAdamW"]
OPTIONS: dict[str, dict[str, Any]] = {
    "LAMB": {"lr": 0.1, "weight_decay": 0.1},
    "LARS": {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.1, "trust_coeff": 0.1},
    "StableAdamW": {"lr": 0.1, "betas": (0.9, 0.9), "weight_decay": 0.1},
}
# One of each way in which rows are added up: in a tile, by a loop, over launches; rows that do not matter.
SHAPES = [(5, 7), (2, 9000), (1, 33_000), (3000,), ()]


def optimizer(name: str, params: Any, backend: str = "eager", **options: Any) -> Any:
    return getattr(fusedcalib, name)(params, backend=backend, **{**OPTIONS[name], **options})


def drawn(shapes: Any, backend: str, seed: int = 0) -> list[torch.nn.Parameter]:
    """Parameters, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device_of(backend))) for s in shapes]
    for p in params:
        p.grad = 3 * torch.randn(p.shape, generator=generator).to(p.device)
    return params


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMED)
def test_every_way_to_add_rows_up_finds_the_norms_of_the_reference(name: str, backend: str):
    """Three steps, of which each may be off by the roundings of its own numbers: 40 of 2^-24, relative.

    Its sums of squares are fp64, the numbers that they are of have 10 roundings of fp32 behind them.
    """
    params = drawn(SHAPES, backend)
    ours = optimizer(name, params, backend, centralize=True)
    wanted = [(p.detach().double().cpu(), dict[str, Any]()) for p in params]
    for t in range(3):
        for i, p in enumerate(params):
            p.grad *= t + 1
            wanted[i] = ORACLES[name](
                *wanted[i][:1], p.grad.double().cpu(), wanted[i][1], **OPTIONS[name], centralize=True
            )
        ours.step()
    for p, (w, _) in zip(params, wanted, strict=True):
        size = w.abs().max().item()
        assert (p.detach().cpu().double() - w).abs().max().item() <= 3 * 40 * 2**-24 * size


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_steps_alike_alone_and_among_others(backend: str):
    """To the last bit: its sums are its own."""
    shapes = [(64, 32), (3, 5), (700,)]
    together, alone = drawn(shapes, backend), drawn(shapes, backend)
    optimizer("LAMB", together, backend).step()
    for p in alone:
        optimizer("LAMB", [p], backend).step()
    for p, q in zip(together, alone, strict=True):
        assert torch.equal(bits(p.detach()), bits(q.detach()))


@pytest.mark.parametrize("backend", FUSED)
def test_launches_do_not_grow_with_the_number_of_tensors(backend: str):
    def launches(count: int) -> int:
        ours = optimizer("LAMB", drawn([(8, 8)] * count, backend), backend)
        return ours._engine.prepare(ours.param_groups, ours.state).step()

    few, many = launches(1), launches(30)
    assert few == many
    assert few <= 3  # squares, their sums, the step


BYTES = {"state_dtype": "8bit", "min_8bit_size": 0}


@pytest.mark.parametrize(("name", "how"), [*((name, {}) for name in NORMED), ("LAMB", BYTES)], ids=str)
def test_loops_find_the_bits_of_plain_torch(name: str, how: dict[str, Any]):
    """Three steps: what is squared is what the step works with, and its sums are fp64."""
    pytest.importorskip("numba")
    results = []
    for backend in ("eager", "numba"):
        params = drawn([(64, 128), (5, 7), (300,)], backend)
        ours = optimizer(name, params, backend, **how)
        for _ in range(3):
            ours.step()
        results.append([p.detach() for p in params])
    for p, q in zip(*results, strict=True):
        assert torch.equal(bits(p), bits(q))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMED)
def test_halves_of_a_tensor_add_up_to_its_norms(name: str, backend: str):
    """Rows of two ranks, side by side: sums to the last bits of fp64, so that the step has the same bits.

    The sums differ by less than 2^-50 here, and the fp32 factor would show that once in 2^26 tensors.
    """
    (whole,) = drawn([(6, 500)], backend)
    assert whole.grad is not None
    grads = torch.split(whole.grad, [2, 4])
    halves, slots = [], []
    ours = optimizer(name, [whole], backend)
    (group,) = ours.param_groups
    recipe = recipe_of(ours.rule, group)
    for part, grad in zip(torch.split(whole.detach(), [2, 4]), grads, strict=True):
        half = torch.nn.Parameter(part.clone())
        half.grad = grad.clone()
        executor = choose(backend, half.device, half.dtype)
        own = tuple(torch.zeros_like(half) for _ in recipe.own_states)
        slots.append(Slot(half, own, 0, recipe, executor, place=Place(0, 500)))
        halves.append(half)
    totals, buckets = [], []
    for slot in slots:
        found = TensorTotals([slot])
        scalars = Scalars()
        scalars.set([scalars_of(recipe, group, 1.0)])
        (bucket,) = build_buckets([slot], scalars, norms=found.parts)
        bucket.key.executor.prepare([bucket])
        bucket.key.executor.step_bucket(bucket, "squares")
        totals.append(found.parts[0])
        buckets.append(bucket)
    both = totals[0] + totals[1]
    assert both[-1] == 3000
    for total, bucket in zip(totals, buckets, strict=True):
        total.copy_(both)
        bucket.key.executor.step_bucket(bucket)
    ours.step()
    assert torch.equal(bits(torch.cat([h.detach() for h in halves])), bits(whole.detach()))


@pytest.mark.parametrize(("weights", "gradient"), [(0.0, 2.0), (2.0, 0.0)])
@pytest.mark.parametrize(("name", "plain"), [("LAMB", "AdamW"), ("LARS", "SGD")])
def test_norms_of_nothing_take_the_factor_one(name: str, plain: str, weights: float, gradient: float):
    """The steps of AdamW and of SGD, to roundings of their numbers in another order."""
    ours, theirs = (torch.nn.Parameter(torch.full((3, 4), weights)) for _ in range(2))
    for p in (ours, theirs):
        p.grad = torch.full((3, 4), gradient)
    optimizer(name, [ours], weight_decay=0.0, always_adapt=True).step()
    own = {"eps": 1e-6} if plain == "AdamW" else {"momentum": 0.9}
    lr = OPTIONS[name]["lr"]
    getattr(fusedcalib, plain)([theirs], lr=lr, weight_decay=0.0, backend="eager", **own).step()
    torch.testing.assert_close(ours, theirs, rtol=2**-22, atol=0)


def test_groups_without_decay_take_no_factor_unless_asked():
    """As timm's classes: biases and norms are in such groups."""
    a, b, c = drawn([(4, 4)] * 3, "eager", seed=1)
    for p in (b, c):
        p.data.copy_(a.data)
        p.grad = a.grad
    optimizer("LAMB", [a], weight_decay=0.0).step()
    optimizer("LAMB", [b], weight_decay=0.0, always_adapt=True).step()
    fusedcalib.AdamW([c], lr=0.1, eps=1e-6, weight_decay=0.0, backend="eager").step()
    torch.testing.assert_close(a, c, rtol=2**-20, atol=2**-22)
    assert not torch.allclose(a, b, rtol=1e-2)


@each(NORMED)
def test_a_step_that_is_left_out_leaves_everything(rule: Any):
    """Its gradient is not finite, and so are its norms."""
    (p,) = drawn([(8, 8)], "eager")
    ours = optimizer(rule.name, [p], skip_nonfinite=True)
    ours.step()
    before = p.detach().clone(), {k: torch.clone(v) for k, v in ours.state[p].items()}
    good = p.grad
    p.grad = torch.full((8, 8), math.inf)
    ours.step()
    assert torch.equal(p, before[0])
    assert all(torch.equal(ours.state[p][k], v) for k, v in before[1].items())
    p.grad = good
    ours.step()
    assert not torch.equal(p, before[0])
    assert bool(p.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["LAMB", "LARS"])
def test_norms_of_large_numbers_do_not_overflow(name: str, backend: str):
    """Their squares do in fp32. A NaN stays where it is: norms that are none take the factor 1."""
    large, broken = drawn([(4, 100)] * 2, backend)
    assert large.grad is not None
    assert broken.grad is not None
    large.data *= 1e25
    large.grad *= 1e25 if name == "LARS" else 1.0
    broken.grad[1, 2] = math.nan
    before = large.detach().clone()
    optimizer(name, [large, broken], backend).step()
    assert bool(large.isfinite().all())
    assert bool((large != before).all())
    assert broken.isnan().sum() == 1


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match="LARS: nesterov=True needs momentum above 0 and dampening=0"):
        fusedcalib.LARS([torch.nn.Parameter(torch.zeros(2))], nesterov=True)
