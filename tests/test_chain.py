"""What a step does around its rule: norm and clip; all at once."""

import io
import math

import pytest
import torch
from cases import BACKENDS, DEVICE, assert_identical, assert_near, parameters, snapshot, train
from chain_cases import EVERYTHING, Pair, each_backend, each_rule_eager, each_run
from rule_cases import RULES

import fusedcalib
from fusedcalib import WeightNoise


@each_rule_eager
def test_clipping_is_that_of_torch(rule, backend):
    """Fifty steps in fp64, clipped and not: gradients differ by the rounding of one factor."""
    pair = Pair(rule, backend, {"max_grad_norm": 5.0})
    clipped = 0
    for step in range(50):
        pair.gradients(scale=0.5 + step % 3)
        norm = torch.nn.utils.clip_grad_norm_(pair.others, 5.0)
        before = [p.grad.clone() for p in pair.params]
        pair.ours.step()
        pair.by_hand.step()
        assert_near(pair.ours.grad_norm, norm, 1e-12, "norm")
        assert_identical([p.grad for p in pair.params], before)
        clipped += norm > 5
    assert 0 < clipped < 50
    pair.check(50)


@pytest.mark.parametrize(("backend", "centralize"), [*((b, False) for b in BACKENDS), ("eager", True)])
def test_the_norm_is_of_all_gradients(backend, centralize):
    """Groups, dtypes, strides, empty tensors; squares beyond fp32's range; before penalties and centring."""
    shapes = ((5, 7), (33,), (), (0, 3), (4, 3, 2, 2), (3, 40000), (70000,))
    params = parameters(shapes) + parameters(shapes, torch.bfloat16)
    params += [torch.nn.Parameter(torch.randn(6, 10, device=DEVICE).t())]
    groups = [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "lr": 0.01}]
    opt = fusedcalib.SGD(groups, lr=0.1, max_grad_norm=math.inf, centralize=centralize, backend=backend)
    for p in params:
        p.grad = torch.randn_like(p)
    params[0].grad[0, 0] = 1e25
    expected = torch.stack([p.grad.double().norm() for p in params]).norm()
    opt.step()
    assert opt.grad_norm.dtype == torch.float32
    assert opt.grad_norm.shape == ()
    assert opt.grad_norm.device == params[0].device
    assert opt.grad_norm.item() == expected.float().item()


@each_backend
def test_every_tile_has_its_part(backend):
    """Of more tiles than a thread takes at once, in the norm and in the step; none outweighs the others."""
    w = torch.nn.Parameter(torch.zeros(1_000_003, device=DEVICE))
    w.grad = torch.randn_like(w)
    opt = fusedcalib.SGD([w], lr=1.0, weight_decay=0.1, max_grad_norm=math.inf, backend=backend)
    opt.step()
    assert opt.grad_norm.item() == pytest.approx(w.grad.double().norm().item(), rel=1e-6)
    assert_identical(w.detach(), -w.grad)


@each_backend
def test_the_norm_alone_changes_nothing(backend):
    plain, measured = (parameters((((5, 7)), (33,))) for _ in range(2))
    for p, q in zip(plain, measured, strict=True):
        q.data.copy_(p.data)
    runs = [(plain, {}), (measured, {"max_grad_norm": math.inf})]
    for params, options in runs:
        torch.manual_seed(1)
        opt = fusedcalib.SGD(params, lr=0.1, weight_decay=0.1, backend=backend, **options)
        train(opt, 3)
    assert_identical([p.detach() for p in plain], [p.detach() for p in measured])


@each_backend
def test_each_group_has_its_own_limit_of_the_common_norm(backend):
    a, b, c = (torch.nn.Parameter(torch.zeros(1, device=DEVICE)) for _ in range(3))
    groups = [
        {"params": [a], "max_grad_norm": 1.0},
        {"params": [b], "max_grad_norm": 2.5},
        {"params": [c]},
    ]
    opt = fusedcalib.SGD(groups, lr=1.0, weight_decay=0.1, backend=backend)  # there is nothing to decay
    for p, g in ((a, 3.0), (b, 4.0), (c, 12.0)):
        p.grad = torch.full_like(p, g)
    opt.step()
    assert opt.grad_norm.item() == 13
    for p, expected in ((a, -3 / 13), (b, -10 / 13), (c, -12)):
        assert p.item() == pytest.approx(expected, rel=1e-6)


@each_backend
def test_without_a_limit_there_is_no_norm(backend):
    params = parameters()
    opt = fusedcalib.SGD(params, lr=0.1, weight_decay=0.1, backend=backend)
    assert opt.grad_norm is None
    train(opt)
    assert opt.grad_norm is None
    opt.param_groups[0]["max_grad_norm"] = 1.0
    train(opt)
    assert opt.grad_norm > 1
    opt.param_groups[0]["max_grad_norm"] = None
    train(opt)
    assert opt.grad_norm is None


@each_backend
@pytest.mark.parametrize(("value", "left"), [(math.inf, [math.nan, 0.0]), (math.nan, [math.nan, math.nan])])
def test_a_norm_that_is_not_finite_is_reported(backend, value, left):
    """As torch's, without error_if_nonfinite: the gradient is multiplied by 1 / inf, or by NaN."""
    p = torch.nn.Parameter(torch.zeros(2, device=DEVICE))
    opt = fusedcalib.SGD([p], lr=1.0, weight_decay=0.1, max_grad_norm=1.0, backend=backend)
    p.grad = torch.tensor([value, 1.0], device=DEVICE)
    opt.step()
    assert not torch.isfinite(opt.grad_norm)
    assert_identical(p.detach().cpu().abs(), torch.tensor(left))


@each_run
def test_everything_saved_and_loaded_goes_on_alike(rule, backend):
    params = parameters(dtype=torch.bfloat16)
    options = {**rule.options, **EVERYTHING, "stochastic_rounding": True, "backend": backend}
    opt = rule.ours(params, **options)
    train(opt, 2)
    file = io.BytesIO()
    torch.save((opt.state_dict(), [p.detach() for p in params]), file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    others = [torch.nn.Parameter(v) for v in values]
    again = rule.ours(others, **options)
    again.load_state_dict(state)
    for optimizer in (opt, again):
        torch.manual_seed(3)
        train(optimizer, 2)
    assert_identical([p.detach() for p in params], [p.detach() for p in others])
    assert_identical(*([s for _, s in snapshot(o)] for o in (opt, again)))


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_at_lr_zero_nothing_moves(rule):
    params = parameters(dtype=torch.bfloat16) + parameters()
    options = {**rule.options, **EVERYTHING, "noise": WeightNoise(), "lr": 0.0, "stochastic_rounding": True}
    opt = rule.ours(params, **options, backend="eager")
    before = [p.detach().clone() for p in params]
    train(opt, 2)
    assert_identical([p.detach() for p in params], before)


@each_backend
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("max_grad_norm", -1.0), ("max_grad_norm", math.nan), ("ema_decay", 1.0), ("ema_decay", -0.1)),
        *(("skip_nonfinite", 1), ("stochastic_rounding", "bf16"), ("state_dtype", torch.int8)),
        *(("state_dtype", "fp8"), ("ema_decay", math.nan)),
    ],
)
def test_bad_values_are_refused(backend, option, value):
    with pytest.raises(ValueError, match=f"Invalid {option} value"):
        fusedcalib.AdamW(parameters(), **{option: value})
    params = parameters()
    opt = fusedcalib.SGD(params, lr=0.1, weight_decay=0.1, backend=backend)
    train(opt)
    opt.param_groups[0][option] = value
    before = snapshot(opt)
    for p in params:
        p.grad = torch.randn_like(p)
    with pytest.raises(ValueError, match=f"Invalid {option} value"):
        opt.step()
    assert_identical(snapshot(opt), before)
