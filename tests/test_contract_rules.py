"""The drop-in contract of what single rules have: a product, an initial value, a step that only measures."""

import pytest
import torch
from cases import (
    BACKENDS,
    Twin,
    assert_identical,
    parameters,
    snapshot,
    state_of,
    train,
    twins,
)
from rule_cases import RULES

NADAM, ADAGRAD, ADOPT, ADEMAMIX = (RULES[name] for name in ("NAdam", "Adagrad", "ADOPT", "AdEMAMix"))
# Who has no gradient in which step: in the end no two parameters have taken as many.
UNEVEN = ((), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3), ())
# What the fused backends make of a stage does not depend on the rule: some there, the others eager.
STAGED = [(name, "eager") for name in RULES]
STAGED += [(name, b) for name in ("SGD", "ADOPT") for b in BACKENDS if b != "eager"]
each_staged = pytest.mark.parametrize(
    ("rule", "backend"), [pytest.param(RULES[n], b, id=f"{n}-{b}") for n, b in STAGED]
)


def products(optimizer, params):
    return [state_of(optimizer, p).get("mu_product") for p in params]


DTYPES = [(b, torch.float32) for b in BACKENDS] + [("eager", d) for d in (torch.float64, torch.bfloat16)]


@pytest.mark.parametrize(("backend", "dtype"), DTYPES, ids=str)
def test_c13_the_product_is_a_host_scalar(backend, dtype):
    built = Twin(NADAM, backend, parameters(dtype=dtype), **NADAM.options).step(2)
    for p in built.params:
        product = state_of(built.ours, p)["mu_product"]
        assert (product.dim(), product.dtype, product.device.type) == (0, torch.float32, "cpu")
    assert products(built.ours, built.params) == products(built.theirs, built.expected)


def test_c14_products_are_per_parameter(backend):
    """Parameters that have taken different numbers of steps, in two groups of different beta1."""

    def arrange(params):
        return [{"params": params[:2]}, {"params": params[2:], "betas": (0.5, 0.9), "momentum_decay": 2.0}]

    built = Twin(NADAM, backend, parameters(), arrange=arrange, **NADAM.options)
    for missing in UNEVEN:
        built.step(missing=missing)
        assert products(built.ours, built.params) == products(built.theirs, built.expected)
    built.check()
    assert len(set(map(float, products(built.ours, built.params)))) == 5


def test_c14_equal_steps_of_different_products(backend):
    """What has stepped alike may have another history: its own product is what counts."""
    built = Twin(NADAM, backend, parameters(((4, 3), (4, 3))), **NADAM.options)
    for missing, beta in (((0,), 0.5), ((1,), 0.9), ((), 0.8), ((), 0.8)):
        built.both(lambda o, params, beta=beta: o.param_groups[0].update(betas=(beta, 0.95)))
        built.step(missing=missing)
    built.check()
    mine = products(built.ours, built.params)
    assert mine == products(built.theirs, built.expected)
    assert mine[0] != mine[1]


def test_c03_a_scheduler_changes_beta1(backend):
    """OneCycleLR moves beta1 in each step: the product is of all that were, whoever stepped when."""
    built = Twin(NADAM, backend, parameters(), **NADAM.options)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=9, base_momentum=0.5) for o, _ in built.sides
    ]
    betas = set()
    for missing in (*UNEVEN, (), ()):
        built.step(missing=missing)
        for scheduler in schedulers:
            scheduler.step()
        betas.add(built.ours.param_groups[0]["betas"][0])
    built.check()
    assert products(built.ours, built.params) == products(built.theirs, built.expected)
    assert len(betas) > 4


def test_c12_products_go_to_torch_and_back(backend):
    """Mid-training, with counters that differ."""
    built = Twin(NADAM, backend, parameters(), **NADAM.options)
    checkpoint = None
    stations = [NADAM.theirs, NADAM.ours, NADAM.theirs, NADAM.ours]
    for station, missing in zip(stations, UNEVEN[1:], strict=False):
        extra = {"backend": backend} if station is NADAM.ours else {}
        built.ours = station(built.params, **NADAM.options, **extra)
        if checkpoint:
            built.ours.load_state_dict(checkpoint)
        built.step().step(missing=missing).check()
        assert products(built.ours, built.params) == products(built.theirs, built.expected)
        checkpoint = built.ours.state_dict()


def test_adagrad_starts_from_its_initial_value(backend):
    """Of the constructor, of a group, of a group added later, of a parameter that comes late."""
    late = parameters(((2, 3),))
    params = parameters()
    ours = ADAGRAD.ours(
        [{"params": params[:2], "initial_accumulator_value": 4.0}, {"params": params[2:]}],
        backend=backend,
        initial_accumulator_value=0.25,
    )
    ours.add_param_group({"params": late, "initial_accumulator_value": 9.0})
    assert not ours.state
    for p in (*params, *late):
        p.grad = torch.zeros_like(p) if p is not params[1] else None
    ours.step()
    starts = [state_of(ours, p).get("sum") for p in (*params, *late)]
    expected = [4.0, None, 0.25, 0.25, 0.25, 9.0]
    for start, value in zip(starts, expected, strict=True):
        assert start is None if value is None else bool((start == value).all())


@pytest.mark.parametrize("started", [False, True], ids=["before", "after a step"])
def test_adagrad_shares_memory(backend, started):
    """As torch's: the accumulators lie in shared memory, and training goes on there."""
    built = Twin(ADAGRAD, backend, parameters(), **ADAGRAD.options)
    if started:
        built.step(missing=(1,))
    for optimizer, params in built.sides:
        optimizer.share_memory()
        assert all(optimizer.state[p]["sum"].is_shared() for p in params)
    kept = [built.ours.state[p]["sum"] for p in built.params]
    built.step(2).check()
    assert all(
        built.ours.state[p]["sum"] is s and s.is_shared() for p, s in zip(built.params, kept, strict=True)
    )


def test_adagrads_checkpoint_before_the_first_step(backend):
    """torch's has state then, ours has none: each loads the other's."""
    for source, target in ((ADAGRAD.ours, ADAGRAD.theirs), (ADAGRAD.theirs, ADAGRAD.ours)):
        built = Twin(ADAGRAD, backend, parameters(), **ADAGRAD.options)
        saved = source(built.params, **ADAGRAD.options).state_dict()
        built.ours = target(built.params, **ADAGRAD.options)
        built.ours.load_state_dict(saved)
        built.step(2).check()


@pytest.mark.parametrize("decoupled", [False, True], ids=["coupled", "decoupled"])
def test_adopts_first_step_moves_nothing(backend, decoupled):
    """It only measures, each parameter's own: no decay, no projection, and the same in every later start."""
    params = parameters()
    told = {**ADOPT.options, "decoupled_weight_decay": decoupled, "max_row_norm": 0.01, "l1": 0.1}
    optimizer = ADOPT.ours(params, backend=backend, **told)
    before = [p.detach().clone() for p in params]
    for p in params[1:]:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert_identical([p.detach() for p in params], before)
    for p, b in zip(params[1:], before[1:], strict=True):
        penalty = 0.1 * b.sign() + (0 if decoupled else told["weight_decay"] * b)
        torch.testing.assert_close(state_of(optimizer, p)["exp_avg_sq"], (p.grad + penalty) ** 2)
        assert not state_of(optimizer, p)["exp_avg"].any()
    params[0].grad = torch.randn_like(params[0])
    optimizer.step()
    assert_identical(params[0].detach(), before[0])
    assert not any(torch.equal(p, b) for p, b in zip(params[1:], before[1:], strict=True) if p.numel())
    assert params[4].flatten(1).norm(dim=1).max() < 0.0101


def test_warm_ups_of_none_are_none():
    """To the constructor, in a group, set later; and one of a single step is over in the first."""
    none = {"alpha_warmup": None, "beta3_warmup": None}
    single = {"alpha_warmup": 1, "beta3_warmup": 1.0}
    (first,) = parameters(((4, 3),))
    of_group, later, *others = (twins([first]) for _ in range(4))
    runs = [
        ADEMAMIX.ours(p, backend="eager", **ADEMAMIX.options) for p in ([{"params": of_group, **none}], later)
    ]
    runs[1].param_groups[0].update(none)
    for params, own in zip(others, (none, single), strict=True):
        runs.append(ADEMAMIX.ours(params, backend="eager", **{**ADEMAMIX.options, **own}))
    assert [runs[i].param_groups[0]["beta3_warmup"] for i in (0, 2)] == [0.0, 0.0]
    for _ in range(2):
        grad = torch.randn(4, 3)
        for run in runs:
            run.param_groups[0]["params"][0].grad = grad.clone()
            run.step()
    for run in runs[1:]:
        assert_identical(snapshot(run), snapshot(runs[0]))


STAGES = [{"centralize": True}, {"centralize": "update", "l1": 0.5, "max_row_norm": 0.1}]


@pytest.mark.parametrize("own", STAGES, ids=str)
@each_staged
def test_c23_no_stage_moves_anything_at_lr_zero(rule, ours, own):
    """Neither decay, which may be decoupled or proximal, nor a largest norm that every row exceeds."""
    params = parameters()
    decoupled = {k: True for k in ("decoupled_weight_decay", "no_prox") if rule.takes(k)}
    for kind in ({}, decoupled):
        optimizer = ours(params, **own, **kind)
        train(optimizer, 2)
        before = [p.detach().clone() for p in params]
        optimizer.param_groups[0].update(lr=0.0, weight_decay=0.5)
        optimizer.param_groups[0]["max_row_norm"] /= 2
        train(optimizer, 2)
        assert_identical([p.detach() for p in params], before)


MIXED = [
    {},
    {"l1": 0.2},
    {"max_row_norm": 0.8, "weight_decay": 0.0},
    {"l1": 0.1, "max_row_norm": 0.5},
    {"weight_decay": 0.0},
    {"maximize": True, "l1": 0.1},
]


@each_staged
def test_groups_of_other_penalties_step_as_apart(rule, ours):
    """On and off mixed: what one group has compiled for another is exactly nothing to it."""
    shapes = ((5, 7), (6,))
    params = [parameters(shapes) for _ in MIXED]
    for group in params:
        with torch.no_grad():
            group[0][0, 0] = 0.0  # where a penalty has no sign
            group[1][1] = -0.0
            group[1][2] = float("inf")  # times no decay at all is no NaN
    apart = [ours(twins(group), **own) for group, own in zip(params, MIXED, strict=True)]
    together = ours([{"params": group, **own} for group, own in zip(params, MIXED, strict=True)])
    for step in range(4):
        for group, optimizer in zip(params, apart, strict=True):
            for p, q in zip(group, optimizer.param_groups[0]["params"], strict=True):
                p.grad = torch.randn_like(p)
                p.grad[0] = float("inf") if step == 2 and p is params[0][1] else 0.0
                q.grad = p.grad.clone()
            optimizer.step()
        together.step()
    expected = [entry for optimizer in apart for entry in snapshot(optimizer)]
    assert_identical(snapshot(together), expected)
    bits = [[p.detach().view(torch.int32) for p in group] for group in params]
    assert_identical(bits, [[q.view(torch.int32) for q, _ in snapshot(optimizer)] for optimizer in apart])
