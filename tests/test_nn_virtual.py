"""Virtual gradients against Algorithm 1, on linear layers and convolutions."""

import copy
import io
import math

import pytest
import torch
from kernel_cases import INTERPRETED, TRITON, device_of
from kernel_compiled import TARGETS
from torch import nn
from torch.nn import functional

from fusedcalib import reference
from fusedcalib.kernels import virtual as kernels
from fusedcalib.nn import VirtualConv2d, VirtualLinear, set_loss_scale, virtualize

F64 = torch.float64
PLAIN = {"scale": 1.0, "rho": 1.0, "eps": 1.0}  # r stays 0, the factor is 1
CONVS = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"groups": 2, "dilation": 2, "padding": (2, 1)},
    {"padding": "same"},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "circular"},
]
LAYERS = {
    "linear": (lambda **o: VirtualLinear(5, 4, dtype=F64, **o), (8, 5)),
    "linear, rows": (lambda **o: VirtualLinear(5, 4, dtype=F64, **o), (4, 3, 5)),
    "linear, position": (lambda **o: VirtualLinear(5, 4, dtype=F64, r_shape="position", **o), (4, 3, 5)),
    "conv": (lambda **o: VirtualConv2d(2, 4, 3, dtype=F64, **o), (8, 2, 6, 6)),
    "conv, channel": (lambda **o: VirtualConv2d(2, 4, 3, dtype=F64, r_shape="channel", **o), (8, 2, 6, 6)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def made(name, **options):
    """A layer and the plain one with its parameters."""
    make, shape = LAYERS[name]
    layer = make(**{"scale": 0.3, **options})
    linear = isinstance(layer, nn.Linear)
    plain = nn.Linear(5, 4, dtype=F64) if linear else nn.Conv2d(2, 4, 3, dtype=F64)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "r"})
    return layer, plain, torch.randn(shape, dtype=F64)


def backward(layer, x, target, factor=1.0, examples=None):
    """Gradients of input, weight and bias for a mean loss of which `target` [m, ...] is a part."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    (factor * (y - target).pow(3).sum() / (examples or len(target))).backward()
    return x.grad, layer.weight.grad, layer.bias.grad


def examples_of(name, x):
    """How many examples the layer sees."""
    return x.shape[0] * x.shape[1] if name == "linear, rows" else x.shape[0]


def target_for(layer, x):
    return torch.randn_like(layer(x).detach())


@each_layer
def test_each_step_is_algorithm_1(name):
    """Three batches: q of each example's own loss, r after it, the weight gradient from both."""
    layer, plain, x = made(name, rho=0.7, eps=1e-3)
    r = 0.0
    for _ in range(3):
        x, target = torch.randn_like(x), target_for(plain, x)
        m = examples_of(name, x)
        dx, dw, db = backward(layer, x, target, examples=m)
        q = (3 * (plain(x) - target) ** 2).detach()  # each example's own
        seen = q.flatten(0, 1) if name == "linear, rows" else q
        if "channel" in name:  # as if each place were an example
            seen = q.transpose(0, 1).flatten(1).T
        r = torch.zeros(seen.shape[1:], dtype=F64) if isinstance(r, float) else r
        scaled, r = reference.virtual_gradient(seen, r, 0.3, 0.7, 1e-3)
        torch.testing.assert_close(layer.r, r, rtol=1e-14, atol=0)
        if "channel" in name:
            scaled = scaled.T.unflatten(1, (len(q), *q.shape[2:])).transpose(0, 1)
        if "conv" in name:
            expected = torch.nn.grad.conv2d_weight(x, layer.weight.shape, scaled) / m
        else:
            expected = reference.virtual_weight_gradient(x.flatten(0, -2), scaled.reshape(-1, 4))
            expected = expected * scaled.reshape(-1, 4).shape[0] / m
        torch.testing.assert_close(dw, expected, rtol=1e-12, atol=1e-14)
        plain_dx, _, plain_db = backward(plain, x, target, examples=m)
        assert torch.equal(dx, plain_dx)
        assert torch.equal(db, plain_db)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@each_layer
def test_plain_gradient(name, dtype):
    """rho = eps = s = 1: the factor is 1, and every gradient torch's own, to the last bit."""
    layer, plain, x = made(name, **PLAIN)
    layer, plain, x = layer.to(dtype), plain.to(dtype), x.to(dtype)
    target = target_for(plain, x)
    for ours, theirs in zip(backward(layer, x, target), backward(plain, x, target), strict=True):
        assert torch.equal(ours, theirs)
    assert not layer.r.any()


@pytest.mark.parametrize("r_shape", ["position", "channel"])
@pytest.mark.parametrize("options", CONVS, ids=str)
def test_every_convolution(options, r_shape):
    layer = VirtualConv2d(2, 4, 3, dtype=F64, r_shape=r_shape, **PLAIN, **options)
    plain = nn.Conv2d(2, 4, 3, dtype=F64, **options)
    virtual = copy.deepcopy(layer)
    layer.load_state_dict({**layer.state_dict(), **plain.state_dict()})
    for shape in ((3, 2, 7, 6), (2, 7, 6)):
        x = torch.randn(shape, dtype=F64)
        assert torch.equal(layer(x), plain(x))
        for net in (layer, plain):
            net.zero_grad()
            net(x).pow(3).sum().backward()
        for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-13)
    assert virtual.r.shape == (0,)


@each_layer
def test_the_papers_and_the_codes_scaling(name):
    """code(s, eps) = paper(m s, m^2 eps), exactly where m is a power of two."""
    paper, plain, x = made(name)
    m = examples_of(name, x) if name != "linear, rows" else 16
    if name == "linear, rows":
        x = torch.randn(4, 4, 5, dtype=F64)
    code = copy.deepcopy(paper)
    virtualized = {"scale": 0.25, "eps": 2.0**-10}
    paper.settings = type(paper.settings)(
        scale=m * virtualized["scale"], eps=m * m * virtualized["eps"], r_shape=paper.settings.r_shape
    )
    code.settings = type(code.settings)(**virtualized, r_shape=code.settings.r_shape, official_scaling=True)
    for _ in range(3):
        target = target_for(plain, x)
        for ours, theirs in zip(
            backward(paper, x, target, examples=m), backward(code, x, target, examples=m), strict=True
        ):
            assert torch.equal(ours, theirs)
    assert torch.equal(paper.r, code.r * m * m)


@each_layer
def test_a_batch_twice_over_is_the_batch(name):
    layer, plain, x = made(name)
    target = target_for(plain, x)
    twin = copy.deepcopy(layer)
    m = examples_of(name, x)
    once = backward(layer, x, target, examples=m)
    twice = backward(twin, torch.cat([x, x]), torch.cat([target, target]), examples=2 * m)
    torch.testing.assert_close(once[1:], twice[1:], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(layer.r, twin.r, rtol=1e-14, atol=0)


@each_layer
def test_a_sum_is_m_means(name):
    mean, plain, x = made(name)
    total, target, m = copy.deepcopy(mean), target_for(plain, x), examples_of(name, x)
    total.settings = type(total.settings)(0.3, loss_reduction="sum", r_shape=total.settings.r_shape)
    a, b = backward(mean, x, target, examples=m), backward(total, x, target, examples=1)
    torch.testing.assert_close([m * g for g in a], list(b), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(mean.r, total.r, rtol=1e-14, atol=0)


@each_layer
def test_scale_is_a_factor(name):
    layer, plain, x = made(name)
    twin = copy.deepcopy(layer)
    twin.settings = type(twin.settings)(4 * 0.3, r_shape=twin.settings.r_shape)
    target = target_for(plain, x)
    assert torch.equal(4 * backward(layer, x, target)[1], backward(twin, x, target)[1])


@each_layer
def test_without_eps_the_size_of_the_loss_does_not_matter(name):
    layer, plain, x = made(name, eps=0.0)
    twin, target = copy.deepcopy(layer), target_for(plain, x)
    small, large = backward(layer, x, target), backward(twin, x, target, factor=100.0)
    torch.testing.assert_close(small[1], large[1], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(100 * small[2], large[2], rtol=1e-13, atol=0)


def test_without_eps_dead_units_have_no_gradient():
    layer = VirtualLinear(3, 2, scale=1.0, eps=0.0)
    layer(torch.randn(4, 3))[:, 0].sum().backward()
    assert layer.weight.grad[1].tolist() == [0.0] * 3


def test_linear_is_a_factor_for_each_row():
    layer, plain, x = made("linear")
    target = target_for(plain, x)
    dw, plain_dw = backward(layer, x, target)[1], backward(plain, x, target)[1]
    factor = 0.3 / (layer.r + 1e-6).sqrt()
    torch.testing.assert_close(dw, factor[:, None] * plain_dw, rtol=1e-15, atol=0)
    assert (dw * plain_dw).sum() > 0
    centred = factor[:, None] * reference.centralize(plain_dw)
    torch.testing.assert_close(reference.centralize(dw), centred, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_scaled_gradients_are_bounded(rho):
    """|s q / sqrt(r + eps)| <= s sqrt(m / (1 - rho)), for one that is all there is in its place too."""
    q, r = torch.zeros(8, 5, dtype=F64), torch.zeros(5, dtype=F64)
    bound = 0.3 * math.sqrt(8 / (1 - rho))
    for size in (1e-3, 1e6, 1.0):
        q[0] = size * torch.randn(5, dtype=F64)
        scaled, r = reference.virtual_gradient(q, r, 0.3, rho)
        assert scaled.abs().max() <= bound * (1 + 1e-12)
    layer = VirtualConv2d(1, 1, 1, dtype=F64, scale=0.3, rho=rho)
    x = torch.ones(8, 1, 1, 1, dtype=F64)
    layer(x)[:1].sum().mul(1e9).div(8).backward()
    assert abs(layer.weight.grad * 8) <= bound * (1 + 1e-12)
    assert abs(layer.weight.grad * 8) >= 0.99 * bound


@each_layer
def test_r_moves_in_training_only(name):
    layer, plain, x = made(name)
    with torch.no_grad():
        layer(x)
    assert not layer.r.numel()
    target = target_for(plain, x)
    backward(layer, x, target)
    r = layer.r.clone()
    assert r.min() > 0
    layer.weight.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    layer.weight.requires_grad_(True)
    layer.eval()
    frozen = backward(layer, x, target)[1]
    assert torch.equal(layer.r, r)
    assert torch.isfinite(frozen).all()
    layer.train()
    backward(layer, x, target)
    assert not torch.equal(layer.r, r)


@each_layer
def test_virtual_bias(name):
    layer, plain, x = made(name, virtual_bias=True)
    target = target_for(plain, x)
    dx, dw, db = backward(layer, x, target)
    other = made(name)[0]
    other.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "r"}, strict=False)
    assert torch.equal(backward(other, x, target)[1], dw)
    factor = 0.3 / (layer.r + 1e-6).sqrt()
    q = torch.autograd.grad((y := plain(x)).sub(target).pow(3).sum() / len(x), y)[0]
    if layer.r.ndim > 1:
        expected = (q * factor).sum([d for d in range(q.ndim) if d != (1 if "conv" in name else q.ndim - 1)])
    else:
        expected = factor * (q.sum((0, 2, 3)) if "conv" in name else q.flatten(0, -2).sum(0))
    torch.testing.assert_close(db, expected, rtol=1e-13, atol=1e-15)
    assert torch.equal(dx, backward(plain, x, target)[0])


# -- loss scale, dtypes, state ------------------------------------------------------------------


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


# -- ranks --------------------------------------------------------------------------------------


def rank_of_two(rank, path, data):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = small_net()
    model[1] = nn.Identity()  # its statistics would be each rank's own
    virtualize(model, scale=0.1)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(wrapped, optimizer, [(x[2 * rank :][:2], y[2 * rank :][:2]) for x, y in data])
    torch.save(model.state_dict(), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    """Half of each batch on either: r and weights as those of the whole batch."""
    data = batches(3)
    torch.multiprocessing.spawn(rank_of_two, (tmp_path, data), nprocs=2)
    torch.manual_seed(0)
    model = small_net()
    model[1] = nn.Identity()
    virtualize(model, scale=0.1)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-15)


# -- the kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (8, 128), (21, 2, 13, 5), (16, 257)])
def test_kernel(backend, dtype, shape):
    """Two steps and one in which nothing is accumulated, against the reference in float64."""
    device = device_of(backend)
    r = torch.zeros(shape[1:], device=device)
    expected = r.double()
    eps = torch.finfo(dtype).eps
    for update in (True, True, False):
        grad = torch.randn(shape).to(device, dtype)
        scaled = torch.empty_like(grad)
        gain = torch.tensor(8.0, device=device)
        kernels.launch_virtual(grad, scaled, r, gain, 0.3, 0.7, 1e-3, update)
        if update:
            expected = reference.virtual_gradient(8 * grad.double(), expected, 0.3, 0.7, 1e-3)[1]
        torch.testing.assert_close(r.double(), expected, rtol=1e-6, atol=0)
        wanted = grad.double() * 0.3 / (expected + 1e-3).sqrt()
        torch.testing.assert_close(scaled.double(), wanted, rtol=eps + 1e-6, atol=1e-7)


@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_kernel_compiles(target, dtype):
    """For GPUs that need not be there."""
    triton = pytest.importorskip("triton")
    pointers = {"grad": f"*{dtype}", "scaled": f"*{dtype}", "r": "*fp32", "gain": "*fp32"}
    numbers = {"examples": "i32", "places": "i32", **dict.fromkeys(("scale", "rho", "fresh", "eps"), "fp32")}
    constants = {"UPDATE": True, "M": kernels.EXAMPLES, "P": kernels.PLACES}
    signature = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
    source = triton.compiler.ASTSource(kernels.virtual_kernel, signature, constexprs=constants)
    gpu = triton.backends.compiler.GPUTarget(*TARGETS[target])
    triton.compile(source, target=gpu, options={"num_warps": 4, "enable_fp_fusion": False})


@pytest.mark.parametrize("backend", [TRITON])
def test_kernel_without_a_finite_sum(backend):
    """What is not finite stays out of r; nothing over nothing is nothing; the plain gradient is exact."""
    device = device_of(backend)
    grad = torch.tensor([[math.inf, math.nan, 0.0, 2.0]], device=device)
    r, one = torch.tensor([3.0, 3.0, 0.0, 0.0], device=device), torch.ones((), device=device)
    scaled = torch.empty_like(grad)
    kernels.launch_virtual(grad, scaled, r, one, 1.0, 0.0, 0.0, True)
    assert r.tolist() == [3.0, 3.0, 0.0, 4.0]
    assert scaled[0, 2:].tolist() == [0.0, 1.0]
    plain = torch.randn(9, 300, device=device)
    r, scaled = torch.zeros(300, device=device), torch.empty_like(plain)
    kernels.launch_virtual(plain, scaled, r, one, 1.0, 1.0, 1.0, True)
    assert torch.equal(scaled, plain)
    assert not r.any()


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("name", ["linear, position", "conv"])
def test_layers_use_the_kernel(backend, name, monkeypatch):
    """On a GPU; here it is told that it may. As without it, for a scaled loss too."""
    from fusedcalib.nn import virtual as module

    device = device_of(backend)
    layer, _, x = made(name)
    layer, x = layer.float().to(device), x.float().to(device)
    twin, target = copy.deepcopy(layer), target_for(layer, x)
    launches = []

    def launch(*arguments):
        launches.append(1)
        kernels.launch_virtual(*arguments)

    monkeypatch.setattr(module, "launch_virtual", launch)
    for _ in range(2):
        monkeypatch.setattr(module, "runs_fused", lambda *_: True)
        ours = backward(layer, x, target)
        monkeypatch.setattr(module, "runs_fused", lambda *_: False)
        theirs = backward(twin, x, target)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.r, twin.r, rtol=1e-6, atol=0)
        set_loss_scale(layer, torch.tensor(64.0, device=device))
        set_loss_scale(twin, 64.0)
    assert len(launches) == 2


# -- the method's own numbers -------------------------------------------------------------------


def test_reference_by_hand():
    scaled, r = reference.virtual_gradient(
        torch.tensor([[3.0], [4.0]], dtype=F64), torch.ones(1), 2.0, 0.5, 0.5
    )
    assert r.item() == 0.5 + 0.5 * 12.5
    torch.testing.assert_close(scaled.flatten(), torch.tensor([6.0, 8.0], dtype=F64) / math.sqrt(7.25))
