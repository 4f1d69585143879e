"""CSGD keeps torch.optim's contracts: groups, schedulers, checkpoints, closures, scalers, errors."""

import copy
import io
import math

import pytest
import torch
from cases import DEVICE
from nn_cases import OPTIONS, batches, branches_of, each_backend, network, train, weights_of
from torch import nn
from torch.nn import functional

import fusedcalib
from fusedcalib import reference
from fusedcalib.nn import CSGD, CalibConv2d, branch_step, csgd_groups

pytestmark = pytest.mark.usefixtures("on_device")


def test_groups():
    model = network()
    model[0][1].bias.requires_grad_(False)
    calibrated, others, branches = csgd_groups(model, branch_lr=0.3)
    assert [name for name, _ in calibrated["params"]] == ["0.1.weight", "3.weight"]
    assert [name for name, _ in others["params"]] == ["1.weight", "1.bias", "3.bias", "6.weight", "6.bias"]
    assert [name for name, _ in branches["params"]] == ["0.1.R", "3.R"]
    assert branches["branch"] is True
    assert [group["lr"] for group in CSGD(csgd_groups(model), lr=0.5).param_groups] == [0.5, 0.5, 0.01]
    assert CSGD([calibrated, branches], lr=0.5).param_groups[1]["lr"] == 0.3
    assert CSGD(model, 0.5, 0.9, branch_lr=0.2).param_groups[2]["lr"] == 0.2
    with pytest.raises(ValueError, match="no CalibConv2d"):
        csgd_groups(nn.Linear(2, 2))


@each_backend
def test_gradients_stay(backend):
    model = network()
    optimizer = CSGD(model, **OPTIONS, backend=backend)
    train(model, optimizer, batches(1))
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(map(torch.equal, grads, values))


@each_backend
@pytest.mark.parametrize("tensor", [False, True])
def test_nothing_moves_where_lr_is_zero(backend, tensor):
    model = network()
    zero = torch.tensor(0.0) if tensor else 0.0
    optimizer = CSGD(model, **{**OPTIONS, "lr": zero}, branch_lr=zero, backend=backend)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, batches(2))
    assert all(map(torch.equal, model.parameters(), before))


def test_schedulers_act_on_branch_weights():
    model, twin = network(), None
    twin = copy.deepcopy(model)
    data = batches(4)
    optimizer = CSGD(model, **OPTIONS, branch_lr=0.4)
    train(model, optimizer, data, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    assert branches_of(optimizer)["lr"] == 0.4 / 16
    other = CSGD(twin, **OPTIONS, branch_lr=0.4)
    for i, batch in enumerate(data):
        other.param_groups[0]["lr"] = other.param_groups[1]["lr"] = 0.1 * 0.5**i
        branches_of(other)["lr"] = 0.4 * 0.5**i
        train(twin, other, [batch])
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@each_backend
def test_resumes_where_it_was(backend):
    """Weights, branch weights, momentum and noise: through a file, in new objects."""

    def build():
        model = network()
        return model, CSGD(model, **OPTIONS, branch_lr=0.3, backend=backend, seed=5)

    data = batches(6)
    model, optimizer = build()
    train(model, optimizer, data[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, data[3:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, other = build()
    branches_of(other)["lr"] = 7.0
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert branches_of(other)["lr"] == 0.3
    train(again, other, data[3:])
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loads_what_sgd_saved():
    """Which does not know what a branch weight is: the group keeps its own word."""
    model = network()
    optimizer = CSGD(model, lr=0.1, backend="eager")
    plain = fusedcalib.SGD([{"params": group["params"]} for group in csgd_groups(model)], lr=0.3)
    optimizer.load_state_dict(plain.state_dict())
    assert [group["branch"] for group in optimizer.param_groups] == [False, False, True]
    optimizer.load_state_dict(torch.optim.SGD(plain.param_groups, lr=0.3).state_dict())
    train(model, optimizer, batches(1))


def test_copies_and_pickles():
    model = network()
    optimizer = CSGD(model, **OPTIONS, branch_lr=0.3)
    twins = copy.deepcopy((model, optimizer))
    data = batches(2)
    train(model, optimizer, data)
    train(*twins, data)
    assert all(map(torch.equal, model.parameters(), twins[0].parameters()))


def test_a_step_without_gradients_or_with_those_of_branches_only():
    model = network()
    optimizer = CSGD(model, **OPTIONS)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    R = weights_of(model)[0]
    R.grad = torch.randn_like(R)
    optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) == 1


def test_closure_and_hooks_run_once():
    """Also where SGD has been made, whose step torch.optim has wrapped."""
    fusedcalib.SGD([nn.Parameter(torch.ones(1))])
    layer = CalibConv2d(1, 1, 3, branches=2)
    optimizer = CSGD(layer, lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    assert optimizer.step(lambda: calls.append("closure") or 3.0) == 3.0
    assert calls == ["pre", "closure", "post"]


def test_maximize_turns_both_around():
    model = network()
    twin = copy.deepcopy(model)
    x, y = batches(1)[0]
    for net, sign in ((model, 1), (twin, -1)):
        optimizer = CSGD(net, lr=0.1, branch_lr=0.3, maximize=sign < 0, backend="eager")
        (functional.cross_entropy(net(x), y) * sign).backward()
        optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


@each_backend
def test_scaled_gradients(backend):
    """fused=True: the step unscales, without rewriting; and is left out where one gradient overflows."""
    model = network(dtype=torch.float32)
    twin = copy.deepcopy(model)
    x, y = batches(1, torch.float32)[0]
    options = {"lr": 0.1, "branch_lr": 0.3}
    train(model, CSGD(model, backend="eager", **options), [(x, y)])
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    optimizer = CSGD(twin, fused=True, backend=backend, **options)
    scaler.scale(functional.cross_entropy(twin(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    before = [p.detach().clone() for p in twin.parameters()]
    weights_of(twin)[0].grad[0, 0, 0] = math.inf
    scaler.step(optimizer)
    assert all(map(torch.equal, twin.parameters(), before))


@pytest.mark.parametrize("where", ["weight", "R"])
def test_steps_with_gradients_that_are_not_finite(where):
    layer = CalibConv2d(1, 2, 3, branches=2)
    optimizer = CSGD(layer, lr=0.1, skip_nonfinite=True)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    getattr(layer, where).grad.view(-1)[0] = math.nan
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer.step()
    assert torch.equal(layer.R, before["R"])
    assert torch.equal(layer.weight, before["weight"]) == (where == "weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_branch_weights_are_stepped_in_fp32(dtype):
    R = nn.Parameter(torch.rand(4, 3, 3).to(dtype))
    R.grad = torch.randn_like(R)
    expected = reference.branch_step(R.detach().float(), R.grad.float(), 0.1).to(dtype)
    CSGD([R], branch=True, branch_lr=0.1).step()
    torch.testing.assert_close(R.detach(), expected, rtol=0, atol=2.0**-9)


def test_errors_change_nothing():
    layer = CalibConv2d(1, 2, 3, branches=2)
    optimizer = CSGD(layer, lr=0.1)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in layer.parameters()]
    grad = layer.R.grad
    optimizer.param_groups[-1]["branch_sign"] = "up"
    with pytest.raises(ValueError, match="Invalid branch_sign: 'up'"):
        optimizer.step()
    optimizer.param_groups[-1]["branch_sign"] = "literal"
    layer.weight.grad = layer.weight.grad.to_sparse()
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert layer.R.grad is grad
    assert all(map(torch.equal, layer.parameters(), before))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branch_lr": -1.0}, "Invalid branch_lr value: -1.0"),
        ({"branch_sign": "ascent"}, "Invalid branch_sign: 'ascent'"),
        ({"branch": 1}, "Invalid branch value: 1"),
        ({"branch": True, "lr": -1.0}, "Invalid learning rate: -1.0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        CSGD([nn.Parameter(torch.ones(2))], **options)
    with pytest.raises(ValueError, match="Invalid branch_sign: 'x'"):
        branch_step(torch.ones(1), torch.ones(1), 0.1, "x")


def test_branch_weights_without_dimensions():
    R = nn.Parameter(torch.tensor(1.0))
    R.grad = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*branch weights are real and \[K, ...\]"):
        CSGD([R], branch=True).step()


def test_under_ddp(tmp_path):
    """The names of a wrapped model are others; its branch weights are found and step as without."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = network()
        twin = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(twin)
        data = batches(3)
        train(model, CSGD(model, lr=0.1, branch_lr=0.3, noise=None, backend="eager"), data)
        train(wrapped, CSGD(wrapped, lr=0.1, branch_lr=0.3, noise=None, backend="eager"), data)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.distributed.destroy_process_group()
