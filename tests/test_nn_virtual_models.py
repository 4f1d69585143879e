"""Virtual layers in models: scaled losses, dtypes, checkpoints, compilation, mistakes."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from virtual_cases import F64, PLAIN, backward, each_layer, made, target_for

from fusedcalib.nn import VirtualConv2d, VirtualLinear, set_loss_scale, virtualize


@each_layer
@pytest.mark.parametrize("kind", ["number", "tensor", "scaler"])
def test_a_scaled_loss(name, kind):
    """r is that of the loss itself, gradients are scaled as all others are."""
    layer, plain, x = made(name)
    twin, target = copy.deepcopy(layer), target_for(plain, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    set_loss_scale(twin, {"number": 1024.0, "tensor": torch.tensor(1024.0), "scaler": scaler}[kind])
    ours, scaled = backward(layer, x, target), backward(twin, x, target, factor=1024.0)
    torch.testing.assert_close([1024 * g for g in ours], list(scaled), rtol=1e-14, atol=0)
    torch.testing.assert_close(layer.r, twin.r, rtol=1e-14, atol=0)


@each_layer
def test_an_overflow_does_not_stay(name):
    layer, plain, x = made(name)
    target = target_for(plain, x)
    backward(layer, x, target)
    r = layer.r.clone()
    target[..., -1] = math.inf
    dw = backward(layer, x, target)[1]
    assert not torch.isfinite(dw).all()
    assert torch.isfinite(layer.r).all()
    assert torch.equal(layer.r[..., -1], r[..., -1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_autocast(name, dtype):
    layer, plain, x = made(name, **PLAIN)
    layer, plain, x = layer.float(), plain.float(), x.float()
    with torch.autocast("cpu", dtype):
        a, b = layer(x), plain(x)
        assert a.dtype == dtype
        assert torch.equal(a, b)
    a.float().pow(2).sum().backward()
    b.float().pow(2).sum().backward()
    assert layer.r.dtype == layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_narrow_layers_accumulate_in_fp32(name):
    layer = {"linear": VirtualLinear(4, 3, dtype=torch.bfloat16, scale=1.0)}.get(
        name, VirtualConv2d(4, 3, 1, dtype=torch.bfloat16, scale=1.0)
    )
    x = torch.randn(4, 4, *([] if name == "linear" else [2, 2])).bfloat16()
    layer(x).float().square().mean().backward()
    assert layer.r.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.bfloat16


def small_net():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3)),
    ).double()


def train(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def batches(n):
    return [(torch.randn(4, 1, 8, 8, dtype=F64), torch.randint(3, (4,))) for _ in range(n)]


def test_virtualize():
    """In place: the same parameters, names, hooks and outputs."""
    model = small_net()
    params = dict(model.named_parameters())
    calls = []
    model[4].register_forward_hook(lambda *_: calls.append(1))
    twin = copy.deepcopy(model)
    assert virtualize(model, scale=0.1, rho=0.8, r_shape="channel") == ["0", "4", "6"]
    assert all(params[name] is p for name, p in model.named_parameters())
    x = batches(1)[0][0]
    assert torch.equal(model(x), twin(x))
    assert calls
    assert type(model[0]) is VirtualConv2d
    assert model[6].settings.rho == 0.8
    assert "scale=0.1, rho=0.8" in repr(model[4])
    with pytest.raises(ValueError, match=r"has no nn\.Linear and no nn\.Conv2d"):
        virtualize(model, scale=0.1)
    alone = nn.Linear(2, 2)
    assert virtualize(alone, 0.1) == [""]
    assert type(alone) is VirtualLinear
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match="has no"):
        virtualize(attention, scale=0.1)


def test_resumes_where_it_was():
    """r is in the state, whose shapes a new model does not know yet."""
    model, data = small_net(), batches(6)
    virtualize(model, scale=0.1)
    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, data[:3])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    train(model, optimizer, data[3:])
    file.seek(0)
    again = start
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again[0].r.shape == (4, 6, 6)
    train(again, torch.optim.SGD(again.parameters(), lr=0.01), data[3:])
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_compiled_models():
    """The layers stay out of the graphs."""
    model, data = small_net(), batches(2)
    virtualize(model, scale=0.1)
    twin = copy.deepcopy(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    train(torch.compile(twin, backend="eager"), torch.optim.SGD(twin.parameters(), lr=0.1), data)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_checkpointed_layers_and_empty_batches():
    """One backward pass, one change of r; none where there is no example."""
    layer, _, x = made("linear")
    twin, x = copy.deepcopy(layer), x.requires_grad_()
    layer(x).sum().backward()
    torch.utils.checkpoint.checkpoint(twin, x, use_reentrant=False).sum().backward()
    assert torch.equal(layer.r, twin.r)
    assert torch.equal(layer.weight.grad, twin.weight.grad)
    layer(x[:0]).sum().backward()
    assert torch.equal(layer.r, twin.r)


def test_outputs_of_another_size():
    layer = VirtualConv2d(1, 2, 3, scale=0.1)
    layer(torch.randn(2, 1, 8, 8)).sum().backward()
    with pytest.raises(ValueError, match=r"squares of \[2, 6, 6\] and now has outputs of \[2, 7, 6\]"):
        layer(torch.randn(2, 1, 9, 8))
    layer.eval()(torch.randn(2, 1, 9, 8))
    free = VirtualConv2d(1, 2, 3, scale=0.1, r_shape="channel")
    for size in (8, 9):
        free(torch.randn(2, 1, size, size)).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, "Invalid scale: -1.0"),
        ({"scale": 1.0, "rho": 1.5}, "Invalid rho: 1.5"),
        ({"scale": 1.0, "eps": -1e-6}, "Invalid eps: -1e-06"),
        ({"scale": 1.0, "r_shape": "row"}, "Invalid r_shape: 'row'"),
        ({"scale": 1.0, "loss_reduction": "none"}, "Invalid loss_reduction: 'none'"),
    ],
)
def test_wrong_options(options, message):
    for make in (lambda **o: VirtualLinear(2, 2, **o), lambda **o: virtualize(nn.Linear(2, 2), **o)):
        with pytest.raises(ValueError, match=message):
            make(**options)


def test_other_mistakes():
    with pytest.raises(TypeError):
        VirtualLinear(2, 2)
    with pytest.raises(TypeError):
        virtualize(nn.Linear(2, 2), 1.0, rh0=0.5)
    with pytest.raises(ValueError, match="has no virtual layer"):
        set_loss_scale(nn.Linear(2, 2), 2.0)
