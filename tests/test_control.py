"""Steps decided on the device: by the kernels of kernels/decide.py, as the host decides them."""

import math

import pytest
import torch
from cases import DEVICE, assert_identical, assert_near, parameters, prepared, snapshot, tolerance
from kernel_cases import TRITON
from rule_cases import RULES, each, each_few

import fusedcalib
from fusedcalib import GradientNoise
from fusedcalib import options as arguments
from fusedcalib.executors.triton.run import interpreted
from fusedcalib.kernels.language import tl
from fusedcalib.layout import recipe, scalars

pytestmark = pytest.mark.parametrize("backend", [TRITON])
each_rule = each(RULES)
SHAPES = ((5, 7), (33,), (), (0, 3), (4, 3, 2, 2))
# One tensor of each row class, in tiles of every kind: held, looped, in pieces, flat.
CLASSES = ((5, 7), (33,), (), (0, 3), (3, 300), (2, 20_000), (1, 40_000), (9000,))


class Runs:
    """The same run on both: `ours` decided on the device, `theirs` on the host."""

    def __init__(self, rule, backend, shapes=SHAPES, dtypes=(torch.float32,), **options):
        torch.manual_seed(0)
        self.params = [p for dtype in dtypes for p in parameters(shapes, dtype)]
        self.others = [torch.nn.Parameter(p.detach().clone()) for p in self.params]
        options = {**rule.options, **options}
        on_host = {k: v for k, v in options.items() if k != "capturable"}
        self.ours = rule.ours(self.params, backend=backend, **options)
        self.theirs = rule.ours(self.others, backend="eager", **on_host)
        self.steps = 0

    def gradients(self, missing=(), scale=1.0):
        for i, (p, q) in enumerate(zip(self.params, self.others, strict=True)):
            p.grad = None if i in missing else torch.randn_like(p) * scale
            q.grad = None if p.grad is None else p.grad.clone()

    def step(self, times=1, **options):
        for _ in range(times):
            self.gradients(**options)
            self.ours.step()
            self.theirs.step()
            self.steps += 1
        return self

    def check(self):
        for p, q in zip(self.params, self.others, strict=True):
            limit = tolerance(p.dtype, self.steps)
            assert_near(p, q, limit, "parameter")
            mine, theirs = (dict(o.state.get(w, {})) for o, w in ((self.ours, p), (self.theirs, q)))
            for name in theirs:
                assert_near(mine[name], theirs[name], 0 if name == "step" else limit, name)


@each_few
def test_capturable_steps(rule, backend):
    """Powers of the device differ from the host's by some 1e-13: numbers by one rounding of fp32 at most."""
    runs = Runs(rule, backend, capturable=True, weight_decay=0.1)
    runs.step().step(2, missing=(1, 4)).step(2).check()
    for p in runs.params:
        assert all(value.device.type == p.device.type for value in runs.ours.state.get(p, {}).values())


@each_few
def test_doubles(rule, backend):
    Runs(rule, backend, capturable=True, dtypes=(torch.float64, torch.float32)).step(3).check()


@each(["AdamW"])
def test_the_whole_chain(rule, backend):
    """Norm, clip, centring, noise, projection, average over every row class and two dtypes."""
    options = {"max_grad_norm": 3.0, "ema_decay": 0.9, "centralize": True, "noise": GradientNoise(1e-3)}
    runs = Runs(rule, backend, CLASSES, max_row_norm=30.0, **options)
    runs.step(2).check()
    runs = Runs(rule, backend, CLASSES[:5], (torch.float32, torch.bfloat16), max_row_norm=30.0, **options)
    runs.step(2).check()
    assert_near(runs.ours.grad_norm, runs.theirs.grad_norm, 1e-6 * runs.theirs.grad_norm.item(), "norm")
    assert runs.ours.grad_norm.device.type == DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [1, 3])
def test_programs_that_take_several_tiles(backend, grid, dtype, monkeypatch):
    """Of bf16 two at once, of which the second may be past the last.

    Interpreted, the last program adds up two sums at a time; what is compiled has a thousand.
    """
    monkeypatch.setattr("fusedcalib.kernels.launch.GRID", grid)
    if interpreted():
        monkeypatch.setattr("fusedcalib.kernels.decide.TOTALS", tl.constexpr(2))
    runs = Runs(RULES["SGD"], backend, CLASSES, (dtype,), max_grad_norm=1.0, centralize=True)
    runs.step(2).check()
    assert_near(runs.ours.grad_norm, runs.theirs.grad_norm, 1e-6 * runs.theirs.grad_norm.item(), "norm")


@each_few
def test_skipped_steps(rule, backend):
    """They leave parameters, state and counters to the bit; the next good one goes on."""
    runs = Runs(rule, backend, skip_nonfinite=True, max_grad_norm=3.0)
    for step in range(4):
        runs.gradients()
        if step in (0, 2):
            runs.params[0].grad[1, 1] = math.inf if step else math.nan
            before = snapshot(runs.ours)
            runs.ours.step()
            assert_identical([p for p, _ in snapshot(runs.ours)], [p for p, _ in before])
            if step:
                assert_identical(snapshot(runs.ours), before)
            assert not runs.ours.grad_norm.isfinite()
        else:
            runs.ours.step()
            runs.theirs.step()
            runs.steps += 1
    runs.check()
    assert runs.ours.skipped_steps.item() == 2


@each(["SGD"])
def test_a_skipped_step_does_not_finish_rows_in_pieces(rule, backend):
    runs = Runs(rule, backend, ((1, 40_000),), skip_nonfinite=True, max_row_norm=30.0, ema_decay=0.9).step()
    runs.gradients(scale=math.inf)
    before = snapshot(runs.ours)
    runs.ours.step()
    assert_identical(snapshot(runs.ours), before)


@each({name: RULES[name] for name in ("SGD", "AdamW", "NAdam")})
@pytest.mark.parametrize("limit", [None, 3.0])
def test_a_scaler(rule, backend, limit):
    runs = Runs(rule, backend, fused=True, max_grad_norm=limit)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=64.0, growth_interval=2)
    scaler.scale(torch.zeros((), device=DEVICE))
    for step in range(6):
        runs.gradients()
        for p in runs.params:
            p.grad *= scaler.get_scale()
        if step in (0, 4):
            runs.params[0].grad[1, 1] = math.inf
        else:
            runs.theirs.step()
            runs.steps += 1
        scaler.step(runs.ours)
        scaler.update()
    runs.check()
    assert runs.ours.skipped_steps.item() == 2


@each_few
def test_options_change(rule, backend):
    """Every number is read at each step."""
    runs = Runs(rule, backend, capturable=True, weight_decay=0.1, max_grad_norm=3.0).step()
    for changed in ({"lr": 0.03}, {"weight_decay": 0.3, "max_grad_norm": 1.0}, {"l1": 0.01}):
        for optimizer in (runs.ours, runs.theirs):
            optimizer.param_groups[0].update(changed)
        runs.step()
    runs.check()


def test_options_change_in_place(backend):
    """A tensor of the host, the dict of the noise."""
    lr = torch.tensor(0.5)
    runs = Runs(RULES["AdamW"], backend, capturable=True, lr=lr, noise=GradientNoise(0.1)).step()
    lr.fill_(0.25)
    runs.step()
    for optimizer in (runs.ours, runs.theirs):
        optimizer.param_groups[0]["noise"]["eta"] = 0.4
    runs.step().check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_on_the_device_are_read_there(backend, dtype, monkeypatch):
    """Changed in place after the host has seen them, as a captured graph sees them."""
    for module in (arguments, recipe, scalars):
        monkeypatch.setattr(module, "is_remote", lambda value: isinstance(value, torch.Tensor))
    w = torch.nn.Parameter(torch.zeros(3, device=DEVICE))
    lr = torch.tensor(0.5, dtype=dtype, device=DEVICE)
    opt = fusedcalib.SGD([w], lr=lr, backend=backend)
    w.grad = torch.ones_like(w)
    opt.step()
    plan = prepared(opt)
    lr.fill_(0.25)
    plan.step()
    assert w.tolist() == [-0.75] * 3


def test_groups_and_histories_have_rows_of_their_own(backend, monkeypatch):
    """Parameters that joined late count for themselves; as many rows as distinct histories."""
    if interpreted():  # two rows and two slots at a time; what is compiled has 128
        monkeypatch.setattr("fusedcalib.kernels.decide._LANES", tl.constexpr(2))
    runs = Runs(RULES["NAdam"], backend, capturable=True)
    runs.step(2, missing=(0,)).step(1, missing=(1,)).step(2)
    runs.check()
    steps = [int(runs.ours.state[p]["step"]) for p in runs.params]
    assert steps == [3, 4, 5, 5, 5]


@pytest.mark.parametrize("columns", [64, 1024, 8192])
def test_two_launches(backend, columns):
    """With everything on, for a list of one dtype set and row class; also where nothing is measured."""
    params = parameters(((4, columns),) * 5, torch.bfloat16)
    chain = {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "stochastic_rounding": True}
    chain |= {"centralize": True, "noise": GradientNoise(), "weight_decay": 0.1, "capturable": True}
    for options in (chain, {"capturable": True}):
        opt = fusedcalib.AdamW(params, backend=backend, **options)
        for p in params:
            p.grad = torch.randn_like(p)
        assert prepared(opt).step() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_launch_measures_lists_that_are_kept_otherwise(backend, dtype):
    """Matrices in bytes and vectors in fp32 are stepped by a launch each; others have a norm each, too."""
    shapes = ((8, 128), (64,), (2, 64), (96,), (9_000,))
    options = {"max_grad_norm": 1.0, "min_8bit_size": 0, "master_weights": "split8"}
    runs = Runs(RULES["AdamW"], backend, shapes, (dtype,), state_dtype="8bit", **options)
    for _ in range(2):
        runs.step()
        expected = torch.cat([p.grad.double().flatten() for p in runs.params]).norm()
        assert_near(runs.ours.grad_norm.double(), expected, 2**-24 * expected.item(), "norm")
    assert prepared(runs.ours).step() == 1 + 2
    plain = Runs(RULES["AdamW"], backend, ((8, 128), (66,)), (dtype,), max_grad_norm=1.0).step()
    assert prepared(plain.ours).step() == 2 * 2


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@each_rule
def test_a_captured_step_replays(rule, backend):
    """With a learning rate and gradients that change between replays; no synchronisation anywhere."""
    lr = torch.tensor(0.01, device=DEVICE)
    chain = {"max_grad_norm": 1.0, "ema_decay": 0.9, "centralize": True, "skip_nonfinite": True}
    runs = Runs(rule, backend, CLASSES, capturable=True, **{**chain, "lr": lr})
    for p, q in zip(runs.params, runs.others, strict=True):
        p.grad, q.grad = torch.randn_like(p), torch.zeros_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def mirror():
        for p, q in zip(runs.params, runs.others, strict=True):
            q.grad.copy_(p.grad)
        runs.theirs.param_groups[0]["lr"] = lr.item()
        runs.theirs.step()
        runs.steps += 1

    with torch.cuda.stream(stream):
        for _ in range(2):
            runs.ours.step()
            mirror()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs.ours.step()
        with torch.cuda.graph(graph):
            runs.ours.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    mirror()
    for step in range(4):
        lr.fill_(0.01 * (step + 1))
        for p in runs.params:
            p.grad.copy_(torch.randn_like(p))
        if step == 1:
            runs.params[0].grad[0, 0] = math.inf
        graph.replay()
        mirror()
    runs.check()
    assert runs.ours.skipped_steps.item() == 1


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_step_that_is_not_ready_is_not_captured(backend):
    (w,) = parameters(((4, 4),))
    w.grad = torch.ones_like(w)
    for options, message in (({}, "capturable=True"), ({"capturable": True}, "run some steps before")):
        opt = fusedcalib.AdamW([w], backend=backend, **options)
        if not options:
            opt.step()
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            opt.step()


@each({name: RULES[name] for name in ("SGD", "Lion", "AdamW")})
def test_states_have_the_same_keys_wherever_a_step_is_decided(rule, backend):
    """A count that only tells whether a first step has been taken stays out of checkpoints, as torch's."""
    runs = Runs(rule, backend, skip_nonfinite=True)
    runs.step()
    for p, q in zip(runs.params, runs.others, strict=True):
        assert runs.ours.state[p].keys() == runs.theirs.state[q].keys()


def test_a_first_step_that_is_left_out_is_not_counted(backend):
    """Nor by a plan that is laid out between: the first one that is taken is not dampened."""
    runs = Runs(RULES["SGD"], backend, skip_nonfinite=True, momentum=0.9, dampening=0.5)
    runs.gradients()
    runs.params[0].grad[0, 0] = math.nan
    runs.ours.step()
    runs.step(missing=(1,)).step().check()
    for optimizer in (runs.ours, runs.theirs):
        optimizer.state.clear()  # to begin anew
    runs.step(2).check()


def test_noise_stays_each_parameters_own_where_steps_come_to_be_left_out(backend):
    """Slots are known then, and made anew for another kernel."""
    runs = Runs(RULES["AdamW"], backend, ((5, 7), (33,)), capturable=True, noise=GradientNoise(0.1)).step()
    for optimizer in (runs.ours, runs.theirs):
        optimizer.param_groups[0]["skip_nonfinite"] = True
    runs.step().check()
