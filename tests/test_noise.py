"""Noise in a step: where it joins, and that nothing but its counter decides it."""

import copy
import itertools
import math

import pytest
import torch
from cases import BACKENDS, DEVICE, assert_identical, parameters, snapshot, train
from rule_cases import RULES

import fusedcalib
from fusedcalib import GradientNoise, LangevinNoise, WeightNoise, noise

each_backend = pytest.mark.parametrize("backend", BACKENDS)


# -- in a step --------------------------------------------------------------------------------

NOISES = (GradientNoise(0.3), WeightNoise(0.1), LangevinNoise(0.5))


def expected_noise(p, step, seed, index, sigma, stage):
    values = noise.normals(0, p.numel(), step, noise.words_of(seed, None, index), sigma, stage)
    return torch.from_numpy(values).view(p.shape)


@pytest.mark.parametrize(
    ("backend", "dtype"), [*((b, torch.float32) for b in BACKENDS), ("eager", torch.float64)], ids=str
)
def test_gradient_noise_is_added_to_the_gradient(backend, dtype):
    params = parameters(dtype=dtype)
    start = [p.detach().clone() for p in params]
    optimizer = fusedcalib.SGD(params, lr=0.5, noise=GradientNoise(0.3), seed=9, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for i, (p, before) in enumerate(zip(params, start, strict=True)):
        z = expected_noise(p, 1, 9, i, math.sqrt(0.3), "gradient").to(p)
        torch.testing.assert_close(p.detach(), before - 0.5 * (1 + z), rtol=1e-6, atol=1e-6)


@each_backend
@pytest.mark.parametrize("kind", [WeightNoise(0.1), LangevinNoise(0.02)])
def test_weight_noise_comes_after_the_step_and_not_at_rest(backend, kind):
    params = parameters()
    start = [p.detach().clone() for p in params]
    optimizer = fusedcalib.SGD(params, lr=0.25, noise=kind, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for i, (p, before) in enumerate(zip(params, start, strict=True)):
        z = expected_noise(p, 1, 0, i, 0.1, "weights").to(p)
        torch.testing.assert_close(p.detach(), before - 0.25 + z, rtol=1e-6, atol=1e-6)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    rest = [p.detach().clone() for p in params]
    optimizer.step()
    assert_identical([p.detach() for p in params], rest)


def run(
    backend, rule, kind, arrange, centralize=False, steps=3, shapes=((5, 7), (33,), (4, 3, 2, 2), (3, 8))
):
    """Weights after some steps; `arrange` makes the optimizer's params of named ones."""
    torch.manual_seed(0)
    named = [(f"w{i}", p) for i, p in enumerate(parameters(shapes))]
    options = {**RULES[rule].options, "noise": kind, "seed": 5, "centralize": centralize, "backend": backend}
    optimizer = RULES[rule].ours(arrange(named), **options)
    for step in range(steps):
        torch.manual_seed(step + 1)
        for _, p in named:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [p.detach() for _, p in named]


ARRANGED = {
    "a group each": lambda named: [{"params": [pair]} for pair in named],
    "backwards": lambda named: named[::-1],
    "groups backwards": lambda named: [{"params": [pair]} for pair in named[::-1]],
}


@each_backend
@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize(("kind", "centralize"), [(NOISES[0], "update"), (NOISES[1], False)])
def test_noise_does_not_depend_on_grouping_or_order(backend, arranged, kind, centralize):
    expected = run(backend, "AdamW", kind, list, centralize)
    assert_identical(run(backend, "AdamW", kind, ARRANGED[arranged], centralize), expected)


@each_backend
def test_noise_does_not_depend_on_tiling(backend):
    """The same elements as rows of a matrix, or as one flat vector."""
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.zeros(6, 1000, device=DEVICE))
    flat = torch.nn.Parameter(torch.zeros(6000, device=DEVICE))
    for p, centralize in ((whole, True), (flat, False)):
        p.grad = torch.zeros_like(p)
        kind = WeightNoise(1.0)
        fusedcalib.SGD([p], lr=1.0, noise=kind, centralize=centralize, backend=backend).step()
    assert_identical(whole.detach().view(-1), flat.detach())


@pytest.mark.parametrize("kind", NOISES, ids=lambda k: k.kind)
@pytest.mark.parametrize("rule", ["AdamW"])
def test_executors_agree(rule, kind):
    """Up to a square root of torch's, which is off by an ulp on a CPU, and what a rule makes of it."""
    found = [run(backend, rule, kind, list, "update") for backend in BACKENDS]
    for a, b in itertools.pairwise(found):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_executors_agree_on_images_whose_channels_come_last():
    """Parameter and gradient lie alike, so all walk them in the order of memory."""
    found = []
    for backend in BACKENDS:
        zeros = torch.zeros(4, 3, 2, 2, device=DEVICE).contiguous(memory_format=torch.channels_last)
        p = torch.nn.Parameter(zeros)
        p.grad = torch.zeros_like(p)
        fusedcalib.SGD([p], lr=1.0, noise=WeightNoise(1.0), backend=backend).step()
        found.append(p.detach())
    for a, b in itertools.pairwise(found):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@each_backend
@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Lion"])
@pytest.mark.parametrize("kind", NOISES, ids=lambda k: k.kind)
def test_a_resumed_run_goes_on_with_the_same_noise(backend, rule, kind):
    params = parameters()
    options = {**RULES[rule].options, "noise": kind, "seed": 3, "backend": backend}
    optimizer = RULES[rule].ours(params, **options)
    train(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = RULES[rule].ours(twins, lr=0.5, backend=backend)  # all else comes from the file
    resumed.load_state_dict(saved)
    for _ in range(2):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        resumed.step()
    assert_identical(snapshot(resumed), snapshot(optimizer))


def test_noise_in_groups_is_plain():
    optimizer = fusedcalib.SGD(parameters(), noise=GradientNoise(0.3))
    assert optimizer.param_groups[0]["noise"] == {"kind": "gradient", "eta": 0.3, "gamma": 0.55}
    assert fusedcalib.SGD(parameters()).param_groups[0]["noise"] == {}


@pytest.mark.parametrize("backend", ["eager", *(b for b in BACKENDS if b == "triton")])
def test_noise_may_be_set_in_a_group_and_taken_away(backend):
    """SGD keeps no count of steps without it; a momentum that exists is not taken for a first one."""
    params = parameters()
    optimizer = fusedcalib.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, backend=backend)
    train(optimizer)
    assert "step" not in optimizer.state[params[0]]
    optimizer.param_groups[0]["noise"] = WeightNoise(0.0)
    twin = copy.deepcopy((params, optimizer))
    twin[1].param_groups[0]["noise"] = {}
    for p, q in zip(params, twin[0], strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer.step()
    twin[1].step()
    assert_identical([p.detach() for p in params], [p.detach() for p in twin[0]])


BAD = {
    "no noise": 0.1,
    "unknown kind": {"kind": "pink"},
    "unknown option": {"kind": "gradient", "sigma": 1.0},
    "negative": WeightNoise(-1.0),
    "not finite": {"kind": "langevin", "temperature": math.nan},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_noise_is_refused(bad):
    with pytest.raises(ValueError, match="Invalid"):
        fusedcalib.SGD(parameters(), noise=bad)
    optimizer = fusedcalib.SGD(parameters())
    optimizer.param_groups[0]["noise"] = bad
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="Invalid"):
        train(optimizer)
    assert_identical(snapshot(optimizer), before)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, None])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="Invalid seed"):
        fusedcalib.SGD(parameters(), noise=WeightNoise(), seed=seed)


# -- what it is for ---------------------------------------------------------------------------


def accuracy(kind, seed, steps):
    """On real digits, of a network of five hidden layers whose weights all start at zero."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor((images - images.mean()) / images.std(), dtype=torch.float32)
    y = torch.tensor(labels)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    widths = [64, 50, 50, 50, 50, 50, 10]
    layers = [m for a, b in itertools.pairwise(widths) for m in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers[:-1])
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    optimizer = fusedcalib.SGD(model.parameters(), lr=0.1, noise=kind, seed=seed)
    for _ in range(steps):
        batch = torch.randint(1000, (32,))
        loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (model(x[1000:]).argmax(1) == y[1000:]).float().mean().item()


def test_gradient_noise_starts_a_network_of_zeros():
    """Neelakantan et al. 2015: without it all units of a layer stay alike, and nothing is learnt."""
    pytest.importorskip("sklearn")
    assert accuracy(None, 1, steps=300) < 0.2
    assert accuracy(GradientNoise(0.01), 1, steps=1500) > 0.85
