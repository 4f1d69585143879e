"""Row factors of virtual layers in the optimizer's pass: as where the backward pass multiplies them."""

import copy
import pickle

import pytest
import torch
from kernel_cases import BACKENDS, device_of
from torch.nn import functional

import fusedcalib
from fusedcalib.nn import VirtualLinear, scale_in_step, virtualize

EPS = torch.finfo(torch.float32).eps


def network(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(1, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(96, 5))
    model = torch.nn.Sequential(*layers).to(device, dtype)
    virtualize(model, scale=0.1, r_shape="channel")
    return model


def backward(model, seed):
    torch.manual_seed(seed)
    weight = model[3].weight
    x, labels = torch.randn(8, 1, 6, 6).to(weight), torch.randint(5, (8,), device=weight.device)
    # A GPU gives the same bits again.
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        functional.cross_entropy(model(x), labels).backward()


def trained(model, optimizer, steps=3, passes=1, freeing=True):
    for step in range(steps):
        optimizer.zero_grad(set_to_none=freeing)
        for part in range(passes):
            backward(model, 10 * step + part)
        optimizer.step()
    return model


def pair(backend="eager", dtype=torch.float32, **options):
    """The same model twice, with its optimizer; that of the second multiplies the factors."""
    models = [network(dtype, device_of(backend)) for _ in range(2)]
    chosen = {"lr": 0.1, "momentum": 0.9, "backend": backend, **options}
    optimizers = [fusedcalib.SGD(model.parameters(), **chosen) for model in models]
    assert scale_in_step(models[1], optimizers[1]) == ["0", "3"]
    return models, optimizers


def assert_alike(models, atol):
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.1, "weight_decay": 0.1}], ids=["plain", "clipped"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_parameters(backend, options):
    """To the bit without sums: the product is rounded alike. A norm's last bits are of its order."""
    models, optimizers = pair(backend, **options)
    for model, optimizer in zip(models, optimizers, strict=True):
        trained(model, optimizer)
    assert_alike(models, 0 if not options else 4 * EPS)
    if options:
        torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm, rtol=4 * EPS, atol=0)
    scaled, plain = (model[3].weight.grad.norm() for model in models)
    assert abs(scaled / plain - 1) > 0.1


@pytest.mark.parametrize("options", [{"centralize": True}, {"max_row_norm": 0.4, "maximize": True}], ids=str)
def test_with_stages_that_want_rows(options):
    """In fp64: sums in another order, magnitudes of 1."""
    models, optimizers = pair(dtype=torch.float64, **options)
    for model, optimizer in zip(models, optimizers, strict=True):
        trained(model, optimizer)
    assert_alike(models, 1e-14)


@pytest.mark.parametrize("freeing", [True, False])
@pytest.mark.parametrize("passes", [2, 3])
def test_gradients_added_up_over_passes(passes, freeing):
    """The factor of the first pass is the step's; later ones multiply by what is missing. In fp64."""
    models, optimizers = pair(dtype=torch.float64)
    for model, optimizer in zip(models, optimizers, strict=True):
        trained(model, optimizer, passes=passes, freeing=freeing)
    assert_alike(models, 1e-14)


def test_a_layer_used_twice_before_its_gradient_is_added_up():
    torch.manual_seed(0)
    layers = [VirtualLinear(4, 4, scale=0.1).double() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [fusedcalib.SGD(layer.parameters(), lr=0.1, backend="eager") for layer in layers]
    scale_in_step(layers[1], optimizers[1])
    x = torch.randn(5, 4, dtype=torch.float64)
    for layer, optimizer in zip(layers, optimizers, strict=True):
        layer(torch.tanh(layer(x))).square().mean().backward()
        optimizer.step()
    assert_alike(layers, 1e-15)


def test_a_gradient_kept_over_a_step():
    """Without zero_grad a step's gradient is part of the next one's."""
    models, optimizers = pair(dtype=torch.float64)
    for model, optimizer in zip(models, optimizers, strict=True):
        for seed in range(3):
            backward(model, seed)
            optimizer.step()
    assert_alike(models, 1e-14)


def test_a_row_that_has_seen_nothing_yet():
    """With eps = 0 its factor is 0 at first, and must not stay so."""
    layers = [VirtualLinear(2, 2, bias=False, scale=1.0, eps=0.0, dtype=torch.float64) for _ in range(2)]
    optimizers = [fusedcalib.SGD(layer.parameters(), lr=0.1, backend="eager") for layer in layers]
    layers[1].load_state_dict(layers[0].state_dict())
    scale_in_step(layers[1], optimizers[1])
    for layer, optimizer in zip(layers, optimizers, strict=True):
        for output in (0, 1):
            layer(torch.ones(3, 2, dtype=torch.float64))[:, output].sum().backward()
        optimizer.step()
    assert_alike(layers, 1e-15)


def test_copies_do_not_know_the_optimizer_and_scale_themselves():
    models, optimizers = pair()
    for other in (copy.deepcopy(models[1]), pickle.loads(pickle.dumps(models[1]))):
        plain = copy.deepcopy(models[0])
        for model in (plain, other):
            trained(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert_alike((plain, other), 0)
    trained(models[1], optimizers[1])
    assert models[1][3].weight.grad.norm() != models[0][3].weight.grad


def test_taken_back_and_after_the_optimizer_is_gone():
    for model in (network(), network()):
        optimizer = fusedcalib.SGD(model.parameters(), lr=0.1)
        scale_in_step(model, optimizer)
        backward(model, 1)
        plain = model[3].weight.grad
        model.zero_grad()
        model[3].r.zero_()
        assert scale_in_step(model, None) == []
        backward(model, 1)
        assert not torch.equal(model[3].weight.grad, plain)
    model = network()
    scale_in_step(model, fusedcalib.SGD(model.parameters(), lr=0.1))  # nobody holds it
    backward(model, 1)
    assert not torch.equal(model[3].weight.grad, plain)


def test_a_model_that_moves_to_another_type():
    models, optimizers = pair()
    for model, optimizer in zip(models, optimizers, strict=True):
        trained(model, optimizer, steps=1)
        model.double()
        optimizer.load_state_dict(optimizer.state_dict())
        trained(model, optimizer, steps=1)
    assert_alike(models, 1e-14)


def test_what_cannot_be_is_refused_and_leaves_all_as_it_was():
    model = network()
    with pytest.raises(TypeError, match="knows no factors"):
        scale_in_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="does not step the weight of layer '3'"):
        scale_in_step(model, fusedcalib.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match="no virtual layer by channel"):
        scale_in_step(torch.nn.Sequential(torch.nn.Linear(2, 2)), None)
    first, second = (fusedcalib.SGD(model.parameters(), lr=0.1, backend="eager") for _ in range(2))
    scale_in_step(model, first)
    backward(model, 1)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="factors that another optimizer multiplies"):
        second.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    first.step()
