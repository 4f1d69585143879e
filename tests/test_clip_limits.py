"""Limits that follow the training, beside their papers in plain Python."""

import math
import statistics

import pytest
import torch

from fusedcalib import AdaGC, EMAClip, ZClip, clip_grad_norm_

NORMS = [1.0, 1.2, 0.9, 1.1, 1.0, 9.0, 1.0, 1.3, 40.0, 0.8]


def clipped(limit, norms, size=1):
    """The norms of gradients after clipping."""
    found = []
    for norm in norms:
        p = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
        p.grad = torch.full((size,), norm / math.sqrt(size), dtype=torch.float64)
        clip_grad_norm_([p], limit)
        found.append(p.grad.norm().item())
    return found


def by_zclip(norms, z_threshold, alpha, warmup):
    """Algorithm of arXiv 2504.02507."""
    mean, variance = statistics.fmean(norms[:warmup]), statistics.pvariance(norms[:warmup])
    found = [*norms[:warmup]]
    for norm in norms[warmup:]:
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        if z > z_threshold:
            norm = mean + z_threshold**2 / z * math.sqrt(variance)
        found.append(norm)
        mean = alpha * mean + (1 - alpha) * norm
        variance = alpha * variance + (1 - alpha) * (norm - mean) ** 2
    return found


def by_mean(norms, multiple, beta, warmup):
    mean, found = 0.0, []
    for t, norm in enumerate(norms, start=1):
        norm = norm if t <= warmup else min(norm, multiple * mean)
        found.append(norm)
        mean += max(1 - beta, 1 / t) * (norm - mean)
    return found


def test_zclip():
    """The factor has 1e-6 beside the norm, which is up to 40: relative errors of that size."""
    expected = by_zclip(NORMS, 2.0, 0.9, 4)
    assert expected[5] < 9
    assert clipped(ZClip(2.0, 0.9, 4), NORMS, 7) == pytest.approx(expected, rel=2e-6)


def test_emaclip():
    expected = by_mean(NORMS, 1.5, 0.8, 3)
    assert expected[5] < 9
    assert clipped(EMAClip(1.5, 0.8, 3), NORMS) == pytest.approx(expected, rel=2e-6)
    assert max(clipped(EMAClip(max_norm=2.0), NORMS)) == pytest.approx(2.0, rel=2e-6)


def test_adagc():
    """Algorithm of arXiv 2502.11034, on two tensors, the second of which spikes."""
    limit, gamma, warmup = AdaGC(1.05, 1.0, 0.9, 3), [math.inf, math.inf], 3
    for t, (a, b) in enumerate([(0.6, 0.9), (3.0, 4.0), (0.5, 0.8), (0.5, 9.0), (0.6, 0.8)]):
        params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        for p, value in zip(params, (a, b), strict=True):
            p.grad = torch.tensor([value])
        clip_grad_norm_(params, limit)
        if t < warmup:
            h = min(1.0, 1 / math.hypot(a, b))
            expected = [a * h, b * h]
            gamma = [min(g, e) for g, e in zip(gamma, expected, strict=True)]
        else:
            expected = [min(v, 1.05 * g) for v, g in zip((a, b), gamma, strict=True)]
            gamma = [0.9 * g + 0.1 * e for g, e in zip(gamma, expected, strict=True)]
        assert [p.grad.item() for p in params] == pytest.approx(expected, rel=1e-5)
    assert limit.state_dict()["gamma"].tolist() == pytest.approx(gamma, rel=1e-5)


def test_a_tensor_without_a_gradient_keeps_its_limit():
    limit, p, q = AdaGC(warmup_steps=1), *(torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    for first, second in ((0.5, 0.5), (0.5, None), (0.5, 0.5)):
        p.grad = torch.tensor([first])
        q.grad = None if second is None else torch.tensor([second])
        clip_grad_norm_([p, q], limit)
    assert q.grad.item() == 0.5
    with pytest.raises(ValueError, match="has followed 2 tensors, but 1"):
        clip_grad_norm_([p], limit)


@pytest.mark.parametrize("make", [EMAClip, ZClip, AdaGC])
def test_states(make):
    """What is saved goes on as what was saved; norms that are not finite teach nothing."""
    limit, other = make(warmup_steps=2), make(warmup_steps=2)
    assert limit.state_dict() == {}
    clipped(limit, NORMS[:5])
    saved = limit.state_dict()
    other.load_state_dict(saved)
    clipped(other, [math.inf, math.nan])
    assert {name: t.tolist() for name, t in other.state_dict().items()} == {
        name: t.tolist() for name, t in saved.items()
    }
    assert clipped(limit, NORMS[5:]) == clipped(other, NORMS[5:])
    with pytest.raises(ValueError, match="load that of the same class"):
        limit.load_state_dict({"mean": 1.0})


@pytest.mark.parametrize("make", [EMAClip, ZClip, AdaGC])
def test_tensors_stay_where_they_are(make):
    """As a captured graph needs it."""
    limit = make(warmup_steps=2)
    clipped(limit, NORMS[:1])
    places = [t.data_ptr() for t in limit._state.values()]
    clipped(limit, NORMS)
    limit.load_state_dict(limit.state_dict())
    assert [t.data_ptr() for t in limit._state.values()] == places


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EMAClip(beta=2.0), "beta is 2.0"),
        (lambda: EMAClip(warmup_steps=0), "warmup_steps is 0"),
        (lambda: ZClip(z_threshold=0.0), "z_threshold is 0.0"),
        (lambda: ZClip(alpha=math.nan), "alpha is nan"),
        (lambda: AdaGC(lambda_rel=-1.0), "lambda_rel is -1.0"),
    ],
)
def test_numbers_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()
