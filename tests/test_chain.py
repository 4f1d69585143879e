"""What a step does around its rule: norm, clip, unscale, skip, average, random rounding, types of state."""

import io
import math

import pytest
import torch
from cases import BACKENDS, DEVICE, assert_identical, assert_near, parameters, snapshot, tolerance, train
from rule_cases import RULES

import fusedcalib
from fusedcalib import GradientNoise, WeightNoise

each_backend = pytest.mark.parametrize("backend", BACKENDS)
# A loop takes seconds to compile: every rule by torch's operations, some by the loops.
COMPILED = ("AdamW",)
each_run = pytest.mark.parametrize(
    ("rule", "backend"),
    [
        pytest.param(RULES[n], b, id=f"{n}-{b}")
        for b in BACKENDS
        for n in RULES
        if b == "eager" or n in COMPILED
    ],
)
EVERYTHING = {
    "max_grad_norm": 1.0,
    "skip_nonfinite": True,
    "ema_decay": 0.9,
    "centralize": True,
    "noise": GradientNoise(),
}


class Pair:
    """One run under two optimizers of a rule: all in the step, and the rule after what is done by hand."""

    def __init__(self, rule, backend, options, plain=(), dtype=torch.float64):
        torch.manual_seed(0)
        self.params = parameters(dtype=dtype)
        self.others = [torch.nn.Parameter(p.detach().clone()) for p in self.params]
        own = {**rule.options, "backend": backend}
        self.ours = rule.ours(self.params, **own, **options)
        self.by_hand = rule.ours(self.others, **own, **dict(plain))

    def gradients(self, scale=1.0, spoiled=False):
        for p, q in zip(self.params, self.others, strict=True):
            p.grad = torch.randn(p.shape, dtype=torch.float64).to(p) * scale
            if spoiled and p.ndim == 2 and p.numel():
                p.grad[0, 0] = math.inf
            q.grad = p.grad.clone()

    def check(self, steps, dtype=torch.float64):
        """To rounding; identical where both do the same."""
        for p, q in zip(self.params, self.others, strict=True):
            assert_near(p, q, tolerance(dtype, steps), "parameter")


# -- the norm and the clip ----------------------------------------------------------------------


@each_run
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


@each_backend
@pytest.mark.parametrize("centralize", [False, True])
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
def test_the_norm_alone_changes_nothing(backend):
    plain, measured = (parameters((((5, 7)), (33,))) for _ in range(2))
    for p, q in zip(plain, measured, strict=True):
        q.data.copy_(p.data)
    runs = [(plain, {}), (measured, {"max_grad_norm": math.inf})]
    for params, options in runs:
        torch.manual_seed(1)
        opt = fusedcalib.AdamW(params, backend=backend, **options)
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
    opt = fusedcalib.SGD(groups, lr=1.0, backend=backend)
    for p, g in ((a, 3.0), (b, 4.0), (c, 12.0)):
        p.grad = torch.full_like(p, g)
    opt.step()
    assert opt.grad_norm.item() == 13
    for p, expected in ((a, -3 / 13), (b, -10 / 13), (c, -12)):
        assert p.item() == pytest.approx(expected, rel=1e-6)


@each_backend
def test_without_a_limit_there_is_no_norm(backend):
    params = parameters()
    opt = fusedcalib.AdamW(params, backend=backend)
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
    opt = fusedcalib.SGD([p], lr=1.0, max_grad_norm=1.0, backend=backend)
    p.grad = torch.tensor([value, 1.0], device=DEVICE)
    opt.step()
    assert not torch.isfinite(opt.grad_norm)
    assert_identical(p.detach().cpu().abs(), torch.tensor(left))


# -- steps that are left out ---------------------------------------------------------------------

SPOILED = (0, 1, 7, 8, 30)


@each_run
def test_skipped_steps_leave_no_trace(rule, backend):
    """Fifty gradients, some not finite, the first two among them: to the bit as if those had not been."""
    pair = Pair(rule, backend, {"skip_nonfinite": True})
    for step in range(50):
        pair.gradients(spoiled=step in SPOILED)
        before = snapshot(pair.ours)
        pair.ours.step()
        if step in SPOILED:
            after = snapshot(pair.ours)
            assert_identical([p for p, _ in after], [p for p, _ in before])
        else:
            pair.by_hand.step()
    assert pair.ours.skipped_steps.item() == len(SPOILED)
    assert_identical([p.detach() for p in pair.params], [p.detach() for p in pair.others])
    for p, q in zip(pair.params, pair.others, strict=True):
        theirs = pair.by_hand.state.get(q, {})
        assert_identical({k: pair.ours.state[p][k] for k in theirs}, dict(theirs))


def scaler_of(device=DEVICE, scale=64.0):
    return torch.amp.GradScaler(device, init_scale=scale, growth_interval=10)


@each_run
@pytest.mark.parametrize("fused", [True, False])
def test_a_scaler_is_what_torch_has(rule, backend, fused):
    """Fifty steps through a GradScaler, which grows and backs off: the gradients are those without it.

    Scales are powers of two, so all of it is exact. With fused=True gradients stay scaled.
    """
    pair = Pair(rule, backend, {"fused": True} if fused else {}, dtype=torch.float32)
    assert pair.ours._step_supports_amp_scaling == fused
    scaler = scaler_of()
    scaler.scale(torch.zeros((), device=DEVICE))  # makes its tensors
    for step in range(50):
        pair.gradients(spoiled=step in SPOILED)
        for p in pair.params:
            p.grad *= scaler.get_scale()
        before = [p.grad.clone() for p in pair.params]
        scaler.step(pair.ours)
        scaler.update()
        if fused:
            assert_identical([p.grad for p in pair.params], before)
        if step not in SPOILED:
            pair.by_hand.step()
    assert scaler.get_scale() != 64
    assert pair.ours.skipped_steps.item() == (len(SPOILED) if fused else 0)
    assert_identical([p.detach() for p in pair.params], [p.detach() for p in pair.others])


@each_backend
@pytest.mark.parametrize("by_user", [False, True], ids=["fused", "unscale_"])
def test_a_scaler_and_a_limit(backend, by_user):
    """The norm is of unscaled gradients, whoever unscales them."""
    params, others = parameters(), parameters()
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    opt = fusedcalib.AdamW(params, fused=True, max_grad_norm=1.0, backend=backend)
    other = fusedcalib.AdamW(others, max_grad_norm=1.0, backend=backend)
    scaler = scaler_of()
    scaler.scale(torch.zeros((), device=DEVICE))
    for _ in range(3):
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * scaler.get_scale()
        if by_user:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        other.step()
        assert opt.grad_norm == other.grad_norm
    assert_identical([p.detach() for p in params], [p.detach() for p in others])


@each_backend
def test_a_skipped_first_step_survives_a_checkpoint(backend):
    """A momentum buffer begins with the first gradient, however many steps were left out before."""
    options = {"momentum": 0.9, "dampening": 0.5, "skip_nonfinite": True, "backend": backend}
    w = torch.nn.Parameter(torch.zeros(3, device=DEVICE))
    opt = fusedcalib.SGD([w], lr=1.0, **options)
    w.grad = torch.full_like(w, math.nan)
    opt.step()
    again = fusedcalib.SGD([w], lr=1.0, **options)
    again.load_state_dict(opt.state_dict())
    w.grad = torch.ones_like(w)
    again.step()
    assert w.tolist() == [-1, -1, -1]


# -- the average -------------------------------------------------------------------------------------


@each_run
def test_the_average_is_that_of_foreach_lerp(rule, backend):
    pair = Pair(rule, backend, {"ema_decay": 0.9})
    average = [q.detach().clone() for q in pair.others]
    for _ in range(50):
        pair.gradients()
        pair.ours.step()
        pair.by_hand.step()
        torch._foreach_lerp_(average, [q.detach() for q in pair.others], 1 - 0.9)
    assert_identical([p.detach() for p in pair.params], [q.detach() for q in pair.others])
    for p, expected in zip(pair.params, average, strict=True):
        # An average is a mean of the same numbers: half a unit of one below 8 at each of 50 roundings.
        assert_near(pair.ours.state[p]["ema"], expected, tolerance(torch.float64, 50), "average")


@each_backend
@pytest.mark.parametrize("columns", [40, 20_000, 40_004])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_of_what_is_stored(backend, columns, dtype):
    """After projection and rounding to bf16; kept in fp32. On rows of any length."""
    w = torch.nn.Parameter(torch.randn(3, columns, device=DEVICE).to(dtype))
    start = w.detach().float().clone()
    opt = fusedcalib.SGD([w], lr=0.5, ema_decay=0.75, max_row_norm=1.0, centralize=True, backend=backend)
    w.grad = torch.randn_like(w)
    opt.step()
    ema = opt.state[w]["ema"]
    assert ema.dtype == torch.float32
    assert w.float().norm(dim=1).max() < 1.1
    assert_identical(ema, torch.lerp(start, w.detach().float(), 0.25))


@each_backend
def test_ema_weights_swaps_in_and_back(backend):
    params = parameters() + parameters(dtype=torch.bfloat16)
    still = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    opt = fusedcalib.AdamW([*params, still], lr=0.1, ema_decay=0.5, backend=backend)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
    before, pointers = snapshot(opt), [p.data_ptr() for p in params]
    with opt.ema_weights():
        for p in params:
            assert_identical(p.detach(), opt.state[p]["ema"].to(p.dtype))
        assert still.tolist() == [1, 1, 1]
        with pytest.raises(RuntimeError, match=r"ema_weights\(\) within"), opt.ema_weights():
            pass
        with pytest.raises(RuntimeError, match=r"step\(\) within ema_weights"):
            opt.step()
        assert_identical([s for _, s in snapshot(opt)], [s for _, s in before])
    assert_identical(snapshot(opt), before)
    with pytest.raises(KeyError), opt.ema_weights():
        raise KeyError
    assert_identical(snapshot(opt), before)
    assert [p.data_ptr() for p in params] == pointers
    train(opt)


def test_without_an_average_there_is_nothing_to_swap():
    opt = fusedcalib.AdamW(parameters())
    train(opt)
    with pytest.raises(RuntimeError, match="set ema_decay"), opt.ema_weights():
        pass


@each_backend
def test_an_average_begins_where_it_is_switched_on(backend):
    params = parameters()
    opt = fusedcalib.AdamW(params, backend=backend)
    train(opt, 2)
    start = [p.detach().clone() for p in params]
    opt.param_groups[0]["ema_decay"] = 0.25
    train(opt)
    for p, old in zip(params, start, strict=True):
        assert_near(opt.state[p]["ema"], old + 0.75 * (p.detach() - old), 1e-6, "average")


# -- random rounding -----------------------------------------------------------------------------------


def rounded(backend, value, count=100_000, seed=0, **options):
    """Many bf16 parameters after a step of SGD from 0 to a value."""
    w = torch.nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device=DEVICE))
    w.grad_dtype = None
    w.grad = torch.full((count,), -value, device=DEVICE)
    fusedcalib.SGD([w], lr=1.0, stochastic_rounding=True, seed=seed, backend=backend, **options).step()
    return w.detach().float().cpu()


@each_backend
@pytest.mark.parametrize("place", [0.0, 0.125, 0.5, 0.9])
def test_rounding_is_unbiased(backend, place):
    """One of the two neighbours, the upper one with the odds of the value's place between them."""
    low, high = 1.0, 1.0 + 2**-7
    x = rounded(backend, low + place * 2**-7)
    assert set(x.tolist()) <= {low, high}
    found = (x == high).float().mean().item()
    assert abs(found - place) <= 5 * math.sqrt(place * (1 - place) / x.numel())  # five standard deviations


@each_backend
def test_rounding_of_special_values(backend):
    """Zero, infinity and NaN stay; a negative number goes to a neighbour too."""
    for value in (0.0, math.inf, -math.inf):
        assert set(rounded(backend, value, 64).tolist()) == {value}
    assert rounded(backend, math.nan, 64).isnan().all()
    assert set(rounded(backend, -1.0 - 2**-8, 1000).tolist()) == {-1.0, -1.0 - 2**-7}


def test_rounding_is_the_same_on_every_executor_and_by_seed():
    one, *others = (rounded(backend, 1.003) for backend in BACKENDS)
    assert all(torch.equal(one, other) for other in others)
    assert not torch.equal(one, rounded(BACKENDS[0], 1.003, seed=1))


@each_backend
@pytest.mark.parametrize("noise", [None, WeightNoise(1e-3)])
def test_rounding_does_not_depend_on_grouping(backend, noise):
    """Named parameters in one group, or in a group each in another order; also next to noise."""
    torch.manual_seed(0)
    start = {name: torch.randn(shape) for name, shape in (("a", (7, 13)), ("b", (50,)), ("c", (2, 5000)))}
    grads = {name: torch.randn_like(t) for name, t in start.items()}

    def run(arrange):
        params = {k: torch.nn.Parameter(t.to(DEVICE, torch.bfloat16)) for k, t in start.items()}
        opt = fusedcalib.AdamW(
            arrange(params), lr=0.1, stochastic_rounding=True, noise=noise, centralize=True, backend=backend
        )
        for _ in range(2):
            for k, p in params.items():
                p.grad = grads[k].to(p)
            opt.step()
        return {k: p.detach() for k, p in params.items()}

    one = run(lambda params: list(params.items()))
    many = run(lambda params: [{"params": [item]} for item in reversed(params.items())])
    assert_identical(one, many)


@each_backend
def test_rounding_leaves_fp32_alone_and_refuses_fp16(backend):
    params = parameters()
    opt = fusedcalib.SGD(params, stochastic_rounding=True, backend=backend)
    train(opt)
    opt = fusedcalib.SGD(parameters(dtype=torch.float16), stochastic_rounding=True, backend=backend)
    with pytest.raises(ValueError, match=r"fp16.*stochastic_rounding=False"):
        train(opt)


@each_backend
def test_random_rounding_goes_on_where_rounding_to_nearest_stands_still(backend):
    """Steps of 2^-10 from 1 in bf16, whose neighbours are 2^-7 and 2^-8 away: 512 of them go 1/2 far."""

    def end(**options):
        w = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16, device=DEVICE))
        opt = fusedcalib.SGD([w], lr=2**-10, backend=backend, **options)
        w.grad = torch.ones_like(w)
        for _ in range(512):
            opt.step()
        return w.detach().double()

    assert (end() == 1).all()
    x = end(stochastic_rounding=True)
    # A step rounds by at most 2^-8, with a variance of 2^-18 at most, and there are 512.
    assert (x - 0.5).abs().max() <= 5 * math.sqrt(512 * 2.0**-18)
    assert abs(x.mean() - 0.5) <= 5 * math.sqrt(512 * 2.0**-18 / 64)


# -- types of state ------------------------------------------------------------------------------------------

DTYPES = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]


@each_run
@pytest.mark.parametrize(("dtype", "state"), DTYPES, ids=str)
@pytest.mark.parametrize("as_name", [False, True])
def test_state_dtype_survives(rule, backend, dtype, state, as_name):
    """Made, saved, loaded by an optimizer with or without it, and by one that loads another's."""
    wanted = str(state).removeprefix("torch.") if as_name else state
    params = parameters(dtype=dtype)
    opt = rule.ours(params, **rule.options, state_dtype=wanted, ema_decay=0.9, backend=backend)
    train(opt, 2)

    def check(optimizer):
        for p in params:
            for name, value in optimizer.state[p].items():
                if name != "step" and value.ndim == p.ndim and name != "mu_product":
                    assert value.dtype == (torch.float32 if name == "ema" else state), name

    check(opt)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = rule.ours(params, **rule.options, backend=backend)
    again.load_state_dict(saved)
    check(again)
    train(again)
    check(again)
    assert again.param_groups[0]["state_dtype"] == str(state).removeprefix("torch.")


@each_backend
def test_state_dtype_is_taken_of_a_checkpoint_without_it(backend):
    params = parameters()
    theirs = torch.optim.AdamW(params)
    train(theirs)
    opt = fusedcalib.AdamW(params, state_dtype=torch.bfloat16, backend=backend)
    opt.load_state_dict(theirs.state_dict())
    assert {opt.state[p]["exp_avg_sq"].dtype for p in params} == {torch.bfloat16}
    train(opt)


# -- all at once ---------------------------------------------------------------------------------------------


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
    opt = fusedcalib.AdamW(params, backend=backend)
    train(opt)
    opt.param_groups[0][option] = value
    before = snapshot(opt)
    for p in params:
        p.grad = torch.randn_like(p)
    with pytest.raises(ValueError, match=f"Invalid {option} value"):
        opt.step()
    assert_identical(snapshot(opt), before)
