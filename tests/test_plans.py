"""Plans: laid out once for each set of live parameters, never used where they no longer hold."""

import gc
import weakref

import pytest
import torch
from cases import DEVICE, parameters
from rule_cases import RULES, each

import fusedcalib
from fusedcalib.engine import engine, plan, plans
from fusedcalib.noise import words_for

SETS = [(0, 1, 2), (0, 1), (1, 2), (0, 1, 2), (2,), (1, 2), (0, 1), (0, 1, 2)]


@pytest.fixture
def laid_out(monkeypatch):
    """The plans that are laid out from now on."""
    found = []
    init = plan.Plan.__init__

    def made(self, *args, **kwargs):
        init(self, *args, **kwargs)
        found.append(weakref.ref(self))

    monkeypatch.setattr(plan.Plan, "__init__", made)
    return found


def live(params, indices):
    for i, p in enumerate(params):
        p.grad = torch.randn_like(p) if i in indices else None


def step(opt, params, indices):
    live(params, indices)
    opt.step()


def test_a_live_set_that_was_seen_is_not_laid_out_again(ours, laid_out):
    params = parameters(((4, 3), (5,), (6, 2)))
    opt = ours(params)
    for indices in SETS * 2:
        step(opt, params, indices)
    before = len(laid_out)
    for indices in SETS * 2:
        step(opt, params, indices)
    assert len(laid_out) == before


def test_alternating_live_sets_step_as_torch_does(twin):
    """Each parameter counts its own steps, whichever plan takes them."""
    run = twin()
    for indices in SETS:
        run.step(missing=[i for i in range(len(run.params)) if i % 3 not in indices])
    run.check()


def test_another_live_set_asks_nothing_of_what_is_known(ours, laid_out, monkeypatch):
    """Of 1000 tensors it is laid out in the time of two or three steps: only what is new is checked."""
    params = parameters(((4, 3), (5,), (6, 2)))
    opt = ours(params)
    step(opt, params, (0, 1, 2))
    asked = []
    check = engine.check_parameter
    monkeypatch.setattr(
        engine, "check_parameter", lambda owner, *rest: (asked.append(owner), check(owner, *rest))
    )
    step(opt, params, (0, 2))
    assert len(laid_out) == 2
    assert not asked
    params[2].data = params[2].data.clone()  # nothing is kept that might keep old memory alive
    step(opt, params, (1, 2))
    assert len(asked) == 2
    opt.param_groups[0]["weight_decay"] = 0.25
    step(opt, params, (1, 2))


@pytest.mark.parametrize("change", ["order", "names"])
def test_every_parameter_keeps_a_stream_of_its_own(change):
    """Of noise; also where its place or name is another and all else is as before."""
    params = parameters(((4, 3), (5,), (6, 2)))
    named = [(f"p{i}", p) for i, p in enumerate(params)] if change == "names" else params
    opt = fusedcalib.SGD(named, lr=0.1, noise=fusedcalib.WeightNoise(0.1), backend="eager")
    step(opt, params, (0, 1, 2))
    (group,) = opt.param_groups
    for key in ("params", "param_names")[: 1 + (change == "names")]:
        group[key] = group[key][::-1]
    step(opt, params, (0, 1, 2))
    found = {slot.param: slot.words for bucket in opt._engine.plan.buckets for slot in bucket.slots}
    assert found == words_for(opt.param_groups)
    assert len({*found.values()}) == 3


def test_a_sparse_gradient_after_a_dense_one_is_refused_as_always(ours):
    """Before anything is asked of it that only dense ones have."""
    params = parameters(((4, 3), (5,)))
    opt = ours(params)
    step(opt, params, (0, 1))
    params[0].grad = torch.randn(4, 3, device=DEVICE).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        opt.step()


def test_a_lazy_gradient_once_does_not_leave_the_loops_for_good():
    pytest.importorskip("numba")
    (p,) = params = parameters(((4, 3),))
    opt = fusedcalib.AdamW(params, backend="auto")
    ran = []
    for lazy in (False, True, False):
        p.grad = torch._neg_view(torch.randn_like(p)) if lazy else torch.randn_like(p)
        opt.step()
        ran.append(opt._engine.plan.buckets[0].key.executor.name)
    assert ran == [ran[0], "eager", ran[0]]
    assert ran[0] != "eager"


@each({"AdamW": RULES["AdamW"]})
@pytest.mark.parametrize("backend", ["eager"])
def test_few_plans_are_kept(ours, laid_out):
    params = parameters([(3, 2)] * 12)
    opt = ours(params)
    for i in range(12):
        step(opt, params, (i,))
    gc.collect()
    assert sum(p() is not None for p in laid_out) <= plans.KEPT < len(params)


@each({name: RULES[name] for name in ("SGD", "AdamW")})
@pytest.mark.parametrize("backend", ["eager"])
def test_kept_plans_do_not_keep_states_alive(rule, backend, laid_out):
    params = parameters(((4, 3), (5,)))
    opt = rule.ours(params, backend=backend, **{**rule.options, "ema_decay": 0.5})
    for indices in ((0, 1), (0,), (0, 1)):
        step(opt, params, indices)
    old = [weakref.ref(opt.state[p]["ema"]) for p in params]
    for p in params:
        opt.state[p]["ema"] = opt.state[p]["ema"].clone()
    step(opt, params, (0, 1))
    gc.collect()
    assert not any(t() is not None for t in old)


def unaligned(t):
    """A tensor like it whose address is no multiple of 16."""
    return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).normal_()


def test_a_gradient_less_aligned_once(ours, laid_out):
    """Two plans, and neither is laid out again; the better one comes back with better gradients."""
    (p,) = params = parameters(((8, 16),))
    opt = ours(params)
    aligned = []
    for make in (torch.randn_like, unaligned, torch.randn_like, unaligned, torch.randn_like):
        p.grad = make(p)
        opt.step()
        aligned.append(opt._engine.plan.buckets[0].key.aligned)
    assert aligned == [True, False, True, False, True]
    assert len(laid_out) == 2


def test_counters_are_read_in_one_copy(monkeypatch):
    """However many there are: each `float(t)` of a tensor on a GPU would wait for it."""
    from fusedcalib.layout import counts

    class OnDevice(torch.Tensor):
        asked = 0

        @property
        def device(self):
            return torch.device("cuda", 0)

        def to(self, *args, **kwargs):
            return self.as_subclass(torch.Tensor)

        def __float__(self):
            OnDevice.asked += 1
            return super().__float__()

    counters = [torch.tensor(float(i)).as_subclass(OnDevice) for i in range(5)]
    assert counts.values_of([*counters, 7, torch.tensor(8.0)]).tolist() == [0, 1, 2, 3, 4, 7, 8]
    assert OnDevice.asked == 0


def test_a_step_that_fails_before_its_first_launch_leaves_no_state(ours, monkeypatch):
    params = parameters(((4, 3), (5,)))
    opt = ours(params)
    step(opt, params, (0,))
    kept = {p: dict(entry) for p, entry in opt.state.items()}
    before = [p.detach().clone() for p in params]

    def fails(self, *args):
        raise MemoryError

    live(params, (0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(plan.Plan, "step", fails)
        with pytest.raises(MemoryError):
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert {p: entry.keys() for p, entry in opt.state.items()} == {
        p: entry.keys() for p, entry in kept.items()
    }
    opt.step()


def test_loops_are_compiled_before_the_first_one_runs(monkeypatch):
    cpu = pytest.importorskip("fusedcalib.executors.numba.run")
    order = []
    kernel_for, on_threads = cpu.kernel_for, cpu.on_threads
    monkeypatch.setattr(cpu, "kernel_for", lambda *a: (order.append("compile"), kernel_for(*a))[1])
    monkeypatch.setattr(cpu, "on_threads", lambda *a: (order.append("run"), on_threads(*a)))
    params = [torch.nn.Parameter(torch.zeros(4, dtype=d)) for d in (torch.float32, torch.float64)]
    for p in params:
        p.grad = torch.ones_like(p)
    fusedcalib.SGD(params, lr=0.1, backend="numba").step()
    assert order == ["compile", "compile", "run", "run"]
