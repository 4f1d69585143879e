"""CSGD: the rule of the branch weights, noise on calibrated weights only, and torch.optim's contracts."""

import copy
import io
import math

import pytest
import torch
from cases import BACKENDS, DEVICE
from torch import nn
from torch.nn import functional

import fusedcalib
from fusedcalib import reference
from fusedcalib.nn import CSGD, BranchExpand, CalibConv2d, branch_step, calibrate, csgd_groups

F64 = torch.float64
SIGNS = ("descent", "literal")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def on_device():
    """Tensors are made where the backends run; convolutions give the same bits again."""
    with torch.device(DEVICE), torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        yield


def network(branches=3, dtype=F64, mode="mixed"):
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    ).to(dtype)
    calibrate(model, branches, mode)
    return model


def weights_of(model):
    return [layer.R for layer in model.modules() if isinstance(layer, CalibConv2d)]


def batches(steps, dtype=F64):
    return [(torch.randn(6, 1, 7, 7, dtype=dtype), torch.randint(3, (6,))) for _ in range(steps)]


def train(model, optimizer, data, scheduler=None):
    for x, y in data:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def branches_of(optimizer):
    return next(group for group in optimizer.param_groups if group["branch"])


# -- the rule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("mode", ["mixed", "grouped"])
def test_a_step_is_the_references(sign, mode):
    model = network(mode=mode)
    optimizer = CSGD(model, lr=0.1, branch_lr=0.5, branch_sign=sign)
    for batch in batches(4):
        before = [R.detach().clone() for R in weights_of(model)]
        train(model, optimizer, [batch])
        for R, old in zip(weights_of(model), before, strict=True):
            torch.testing.assert_close(R, reference.branch_step(old, R.grad, 0.5, sign), rtol=0, atol=1e-15)
            assert R.min() >= 0
            torch.testing.assert_close(R.sum(0), torch.ones_like(R[0]), rtol=0, atol=1e-14)
            assert not torch.equal(R, old)


def test_descent_goes_down():
    """The branch weights alone lower the loss by one sign, and raise it by the other."""
    x, y = batches(1)[0]
    start = network()
    for layer in start:
        layer.train(not isinstance(layer, nn.BatchNorm2d))
    for sign, factor in (("descent", -1), ("literal", 1)):
        model = copy.deepcopy(start)
        optimizer = CSGD(csgd_groups(model)[-1:], branch_lr=0.01, branch_sign=sign)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            losses.append(functional.cross_entropy(model(x), y))
            losses[-1].backward()
            optimizer.step()
        assert (losses[1] - losses[0]) * factor > 0


@each_backend
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"centralize": True}], ids=str
)
def test_one_branch_without_noise_is_sgd(backend, options):
    """To the last bit, whether R is stepped as such or SGD leaves it alone."""
    model = network(branches=1, dtype=torch.float32)
    twin = copy.deepcopy(model)
    for R in weights_of(twin):
        R.requires_grad_(False)
    data = batches(5, torch.float32)
    train(model, CSGD(model, lr=0.1, noise=None, backend=backend, **options), data)
    train(twin, fusedcalib.SGD(twin.parameters(), lr=0.1, backend=backend, **options), data)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@each_backend
def test_without_branch_weights_it_is_sgd(backend):
    params = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours = CSGD(params, lr=0.1, momentum=0.9, noise=None, backend=backend)
    theirs = fusedcalib.SGD(twins, lr=0.1, momentum=0.9, backend=backend)
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert all(map(torch.equal, params, twins))


@each_backend
def test_branch_weights_know_no_other_option(backend):
    """Nor does their part change that of the weights: momentum, decay, noise, centring, clipping, limits."""
    options = {"momentum": 0.9, "weight_decay": 0.5, "centralize": True, "centralize_min_ndim": 1, "l1": 0.1}
    options |= {"max_row_norm": 0.1, "max_grad_norm": 1e-3, "ema_decay": 0.5}
    R = nn.Parameter(torch.rand(3, 2, 2))
    w = nn.Parameter(torch.randn(4, 3))
    alone = nn.Parameter(w.detach().clone())
    groups = [{"params": [R], "branch": True, "lr": 0.1}, {"params": [w], "noise": None}]
    ours = CSGD(groups, lr=0.2, backend=backend, **options)
    theirs = fusedcalib.SGD([alone], lr=0.2, backend=backend, **options)
    for _ in range(3):
        before = R.detach().clone()
        R.grad, w.grad = torch.randn_like(R), torch.randn_like(w)
        alone.grad = w.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(R.detach(), reference.branch_step(before, R.grad, 0.1))
        assert torch.equal(w, alone)
    assert R not in ours.state


# -- noise --------------------------------------------------------------------------------------


def test_noise_is_on_calibrated_weights_only():
    """Mean 0, std as asked for, not multiplied by lr, other numbers in each element and step."""
    model = nn.Sequential(CalibConv2d(16, 64, 3, branches=2), nn.Conv2d(128, 64, 1))
    optimizer = CSGD(model, lr=1e-30, noise=fusedcalib.WeightNoise(0.5), branch_lr=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moves = []
    for _ in range(2):
        old = model[0].weight.detach().clone()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moves.append(model[0].weight.detach() - old)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name != "0.weight")
    for move in moves:
        n = move.numel()
        assert abs(move.mean()) < 5 * 0.5 / math.sqrt(n)
        assert abs(move.std() / 0.5 - 1) < 5 / math.sqrt(2 * n)
        assert abs((move[:, :16] * move[:, 16:]).mean()) < 5 * 0.25 / math.sqrt(n / 2)
    assert abs((moves[0] * moves[1]).mean()) < 5 * 0.25 / math.sqrt(n)


def test_row_sums_walk_at_random():
    """Var(row sum) = M sigma^2 t."""
    layer = CalibConv2d(4, 512, 3, branches=2, bias=False)
    optimizer = CSGD(layer, lr=1e-30, noise=fusedcalib.WeightNoise(0.1))
    start, rows = layer.weight.detach().sum((1, 2, 3)), layer.weight[0].numel()
    for _ in range(8):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    variance = (layer.weight.detach().sum((1, 2, 3)) - start).var()
    assert abs(variance / (rows * 0.01 * 8) - 1) < 5 * math.sqrt(2 / 512)


def test_default_noise():
    groups = CSGD(network()).param_groups
    assert [group["noise"] for group in groups[:2]] == [{"kind": "weights", "std": 1e-4}, {}]


def test_no_random_numbers_of_torch_are_used():
    model, data = network(), batches(2)
    optimizer = CSGD(model, lr=0.1)
    state = torch.random.get_rng_state()
    train(model, optimizer, data)
    assert torch.equal(torch.random.get_rng_state(), state)


# -- contracts ----------------------------------------------------------------------------------


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
    optimizer = CSGD(model, lr=0.1, backend=backend)
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
    optimizer = CSGD(model, lr=zero, branch_lr=zero, weight_decay=0.1, backend=backend)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, batches(2))
    assert all(map(torch.equal, model.parameters(), before))


def test_schedulers_act_on_branch_weights():
    model, twin = network(), None
    twin = copy.deepcopy(model)
    data = batches(4)
    optimizer = CSGD(model, lr=0.1, branch_lr=0.4, noise=None)
    train(model, optimizer, data, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    assert branches_of(optimizer)["lr"] == 0.4 / 16
    other = CSGD(twin, lr=0.1, branch_lr=0.4, noise=None)
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
        return model, CSGD(model, lr=0.1, momentum=0.9, branch_lr=0.3, backend=backend, seed=5)

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
    optimizer = CSGD(model, lr=0.1)
    plain = fusedcalib.SGD([{"params": group["params"]} for group in csgd_groups(model)], lr=0.3)
    optimizer.load_state_dict(plain.state_dict())
    assert [group["branch"] for group in optimizer.param_groups] == [False, False, True]
    optimizer.load_state_dict(torch.optim.SGD(plain.param_groups, lr=0.3).state_dict())
    train(model, optimizer, batches(1))


def test_copies_and_pickles():
    model = network()
    optimizer = CSGD(model, lr=0.1, branch_lr=0.3)
    twins = copy.deepcopy((model, optimizer))
    data = batches(2)
    train(model, optimizer, data)
    train(*twins, data)
    assert all(map(torch.equal, model.parameters(), twins[0].parameters()))


def test_a_step_without_gradients_or_with_those_of_branches_only():
    model = network()
    optimizer = CSGD(model, lr=0.1)
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
        optimizer = CSGD(net, lr=0.1, branch_lr=0.3, maximize=sign < 0)
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
    options = {"lr": 0.1, "branch_lr": 0.3, "backend": backend}
    train(model, CSGD(model, **options), [(x, y)])
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    optimizer = CSGD(twin, fused=True, **options)
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
        train(model, CSGD(model, lr=0.1, branch_lr=0.3, noise=None), data)
        train(wrapped, CSGD(wrapped, lr=0.1, branch_lr=0.3, noise=None), data)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.distributed.destroy_process_group()


def test_expanded_images_of_several_channels():
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(BranchExpand(2)(x), torch.cat([x, x], 1))
