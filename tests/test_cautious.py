"""Cautious updates and cautious weight decay: stages of every rule."""

from typing import Any

import pytest
import torch
from kernel_cases import BACKENDS, device_of
from kernel_trial import bits
from rule_cases import RULES, each

import fusedcalib
from fusedcalib.reference import ORACLES

BOTH = {"cautious": True, "cautious_weight_decay": True}
DECOUPLED = ["AdamW", "SGDW", "Lion", "Signum", "AdEMAMix", "LaProp", "LAMB", "StableAdamW"]


def stepped(name: str, backend: str, dtype: torch.dtype, **options: Any) -> tuple[list[Any], list[Any]]:
    """Parameters after three steps, and what the oracle makes of them in fp64."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 40), (300,), ()]
    start = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    params = [torch.nn.Parameter(t.to(device_of(backend))) for t in start]
    ours = getattr(fusedcalib, name)(params, backend=backend, **options)
    wanted = [(t.double(), dict[str, Any]()) for t in start]
    for _ in range(3):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator).to(dtype)
            p.grad = g.to(p.device)
            wanted[i] = ORACLES[name](wanted[i][0], g.double(), wanted[i][1], **options)
        ours.step()
    return [p.detach().cpu() for p in params], [w for w, _ in wanted]


@each(DECOUPLED)
def test_every_rule_follows_the_reference_in_fp64(rule: Any):
    """Three steps, of quotients by 1e-3 at least: 1e-16 becomes less than 1e-10."""
    found, wanted = stepped(rule.name, "eager", torch.float64, **rule.options, **BOTH, centralize="update")
    for p, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_executors_have_the_same_bits(backend: str):
    """Without sums over rows those of plain torch; with momentum, whose signs are not the gradient's."""
    options = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.3, **BOTH}
    found, wanted = stepped("AdamW", backend, torch.float32, **options)
    plain, _ = stepped("AdamW", "eager", torch.float32, **options)
    for p, q, w in zip(found, plain, wanted, strict=True):
        assert torch.equal(bits(p), bits(q))
        torch.testing.assert_close(p.double(), w, rtol=1e-5, atol=1e-6)


@each(["AdamW", "SGD", "Adan", "ADOPT"])
def test_what_disagrees_with_the_gradient_stays(rule: Any):
    """Where momentum still goes on against the gradient nothing moves; its state does."""
    p = torch.nn.Parameter(torch.ones(2, 3))
    ours = rule.ours([p], **{**rule.options, "weight_decay": 0.0, "lr": 0.01}, cautious=True, backend="eager")
    p.grad = torch.full((2, 3), 5.0)
    for _ in range(3):
        ours.step()
    p.grad = torch.tensor([[5.0, -0.01, 0.0]] * 2)
    before = p.detach().clone()
    state = {k: torch.clone(v) for k, v in ours.state[p].items()}
    ours.step()
    assert torch.equal(p != before, torch.tensor([[True, False, False]] * 2))
    assert any(not torch.equal(ours.state[p][k], v) for k, v in state.items() if v.ndim)


def test_decay_is_left_out_where_an_update_points_away_from_zero():
    p = torch.nn.Parameter(torch.tensor([2.0, -2.0, 2.0]))
    p.grad = torch.tensor([1.0, 1.0, 0.0])
    ours = fusedcalib.SGDW([p], lr=0.5, weight_decay=0.5, cautious_weight_decay=True, backend="eager")
    ours.step()
    assert p.tolist() == [1.5 - 0.5, -2.0 - 0.5, 1.5]


@pytest.mark.parametrize(
    ("name", "options"), [("Adam", {}), ("SGD", {}), ("Adan", {}), ("LARS", {}), ("Signum", None)], ids=str
)
def test_coupled_decay_cannot_be_cautious(name: str, options: Any):
    p = torch.nn.Parameter(torch.ones(2))
    options = {"decoupled_weight_decay": False} if options is None else options
    with pytest.raises(ValueError, match=f"{name}: cautious_weight_decay=True needs decoupled weight decay"):
        getattr(fusedcalib, name)([p], weight_decay=0.1, cautious_weight_decay=True, **options)
    getattr(fusedcalib, name)([p], weight_decay=0.0, cautious_weight_decay=True, **options)


@each(["AdamW", "NAdam"])
def test_groups_and_checkpoints_keep_the_options(rule: Any):
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    ours = rule.ours([{"params": [a], "cautious": True}, {"params": [b]}], backend="eager")
    assert [group["cautious"] for group in ours.param_groups] == [True, False]
    other = rule.ours([{"params": [a]}, {"params": [b]}], backend="eager")
    other.load_state_dict(ours.state_dict())
    assert [group["cautious"] for group in other.param_groups] == [True, False]


def test_the_table_of_rules_is_used():
    assert set(DECOUPLED) <= RULES.keys()
