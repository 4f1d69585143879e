"""The average of the parameter, and types of state."""

import io

import pytest
import torch
from cases import DEVICE, assert_identical, assert_near, parameters, snapshot, tolerance, train
from chain_cases import Pair, each_backend, each_rule_eager, each_run

import fusedcalib


@each_rule_eager
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
    """After projection and rounding to bf16; kept in fp32. On rows of any length; one is short enough."""
    w = torch.nn.Parameter(torch.randn(3, columns, device=DEVICE).to(dtype))
    w.data[0] *= 0.5 / columns**0.5
    start = w.detach().float().clone()
    opt = fusedcalib.SGD([w], lr=0.5, ema_decay=0.75, max_row_norm=1.0, centralize=True, backend=backend)
    w.grad = torch.randn_like(w)
    w.grad[0] *= 0.1 / columns**0.5
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


DTYPES = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]


@each_run
@pytest.mark.parametrize(("dtype", "state"), DTYPES, ids=str)
@pytest.mark.parametrize("as_name", [False, True])
def test_state_dtype_survives(rule, backend, dtype, state, as_name):
    """Made, saved, loaded by an optimizer with or without it, and by one that loads another's."""
    if backend == "numba" and dtype != torch.bfloat16:
        pytest.skip("of loops one pair of dtypes; all are tried in tests/test_kernels.py")
    wanted = str(state).removeprefix("torch.") if as_name else state
    params = parameters(dtype=dtype)
    opt = rule.ours(params, **rule.options, state_dtype=wanted, ema_decay=0.9, backend=backend)
    train(opt, 2)

    def check(optimizer):
        for p in params:
            for name, value in optimizer.state[p].items():
                if name != "step" and value.shape == p.shape and name != "mu_product":
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
