"""Muon beside AdamW in one optimizer, with the stages of a step; what it refuses."""

import copy
import math
import os

import pytest
import torch
from torch import nn

import fusedcalib
from fusedcalib.engine.kept import weights_of
from fusedcalib.matrices import muon


def parameters(*shapes, dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def mixed(dtype=torch.float32, backend="eager", **options):
    """Two matrices and a vector in one optimizer, with gradients."""
    matrices, others = parameters((8, 16), (16, 8), dtype=dtype), parameters((40,), dtype=dtype)
    for p in (*matrices, *others):
        p.grad = torch.randn_like(p)
    groups = [{"params": matrices}, {"params": others, "use_muon": False, "eps": 1e-8}]
    return [*matrices, *others], fusedcalib.Muon(groups, lr=0.02, backend=backend, **options)


def twin(params, opt, **options):
    """The same parameters, apart, in an optimizer with other options."""
    mine = copy.deepcopy(params)
    for p, q in zip(params, mine, strict=True):
        q.grad = p.grad.clone()
    groups = [{**group, **options, "params": []} for group in opt.param_groups]
    groups[0]["params"], groups[1]["params"] = mine[:2], mine[2:]
    return mine, fusedcalib.Muon(groups, backend="eager")


def test_other_groups_step_as_adamw():
    params, opt = mixed(weight_decay=0.3)
    alone = nn.Parameter(params[2].detach().clone())
    adamw = fusedcalib.AdamW([alone], lr=0.02, betas=(0.9, 0.95), weight_decay=0.3, backend="eager")
    for _ in range(3):
        params[2].grad = torch.randn(40)
        alone.grad = params[2].grad.clone()
        opt.step()
        adamw.step()
    torch.testing.assert_close(params[2], alone, rtol=1e-6, atol=1e-7)
    assert opt.state[params[2]].keys() == adamw.state[alone].keys()
    assert opt.state[params[2]]["step"] == 3
    assert {*opt.state[params[0]]} == {"momentum_buffer", "update"}


in_interpreter = [
    pytest.mark.interpreted,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="interpreted"),
]


@pytest.mark.parametrize("backend", ["numba", pytest.param("triton", marks=in_interpreter)])
def test_executors_agree(backend):
    params, opt = mixed(backend=backend, max_grad_norm=1.0, ema_decay=0.5)
    mine, other = twin(params, opt)
    for _ in range(2):
        opt.step()
        other.step()
    for p, q in zip(params, mine, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0.02 * 2**-5)
        torch.testing.assert_close(opt.state[p]["ema"], other.state[q]["ema"], rtol=1e-6, atol=0.02 * 2**-5)
    assert opt.grad_norm is not None


@pytest.mark.interpreted
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a device of the interpreter")
def test_a_device_leaves_out_both_halves():
    params, opt = mixed(backend="triton", skip_nonfinite=True)
    opt.step()
    before = [p.detach().clone() for p in params]
    good = params[1].grad
    params[1].grad = torch.full_like(good, math.inf)
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert int(opt.skipped_steps) == 1
    params[1].grad = good
    opt.step()
    assert all(not torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_clips_by_the_norm_of_all():
    params, opt = mixed(max_grad_norm=0.5)
    mine, other = twin(params, opt, max_grad_norm=0.0)
    norm = nn.utils.clip_grad_norm_(mine, 0.5)
    opt.step()
    other.step()
    torch.testing.assert_close(opt.grad_norm, norm)
    assert opt._engine.plan.needs.measure
    assert not opt._second.plan.needs.measure  # what the first half has done
    for p, q in zip(params, mine, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=0.02 * 2**-5)
    buffers = [opt.state[params[0]]["momentum_buffer"], other.state[mine[0]]["momentum_buffer"]]
    torch.testing.assert_close(*buffers, rtol=1e-5, atol=1e-8)


def test_a_step_that_is_left_out_changes_nothing():
    params, opt = mixed(skip_nonfinite=True)
    before = [p.detach().clone() for p in params]
    params[1].grad[0, 0] = math.nan
    opt.step()
    assert not opt.state
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    params[1].grad[0, 0] = 0.0
    opt.step()
    kept = copy.deepcopy(opt.state_dict())
    params[1].grad[0, 0] = math.nan
    opt.step()
    for entry, then in zip(opt.state_dict()["state"].values(), kept["state"].values(), strict=True):
        assert all(torch.equal(entry[key], then[key]) for key in then)
    assert int(opt.skipped_steps) == 2


def test_a_step_that_fails_changes_nothing(monkeypatch):
    params, opt = mixed(ema_decay=0.9)
    before = [p.detach().clone() for p in params]

    def fail(buckets):
        raise MemoryError("no memory")

    monkeypatch.setattr(muon, "prepare", fail)
    with pytest.raises(MemoryError):
        opt.step()
    assert not opt.state
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    monkeypatch.undo()
    mine, other = twin(params, opt)
    opt.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, mine, strict=True))
    assert opt.state[params[2]]["step"] == 1


def test_average_and_row_cap_are_of_the_step():
    params, opt = mixed(ema_decay=0.5)
    for group in opt.param_groups[:1]:
        group["max_row_norm"] = 1.0
    before = params[0].detach().clone()
    opt.step()
    torch.testing.assert_close(opt.state[params[0]]["ema"], (before + params[0].detach()) / 2)
    assert all(p.detach().norm(dim=1).max() < 1 + 1e-5 for p in params[:2])
    with opt.ema_weights():
        assert torch.equal(params[0], opt.state[params[0]]["ema"])


@pytest.mark.parametrize("backend", ["eager", pytest.param("numba", marks=pytest.mark.slow)])
def test_master_weights_are_those_of_fp32(backend):
    """A step of bf16 parameters with 16 bits beside them is that of fp32 ones."""
    params, opt = mixed(torch.bfloat16, backend, master_weights="split16", max_grad_norm=math.inf)
    whole = [nn.Parameter(p.detach().float()) for p in params]
    groups = [{"params": whole[:2]}, {"params": whole[2:], "use_muon": False, "eps": 1e-8}]
    other = fusedcalib.Muon(groups, lr=0.02, backend="eager", state_dtype=torch.bfloat16)
    for _ in range(3):
        for p, q in zip(params, whole, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float()
        opt.step()
        other.step()
    for p, q in zip(params, whole, strict=True):
        torch.testing.assert_close(weights_of(p, opt.state[p]), q.detach(), rtol=1e-6, atol=0.02 * 2**-5)


def test_noise_and_rounding_are_of_the_step():
    params, opt = mixed(torch.bfloat16, stochastic_rounding=True, noise=fusedcalib.WeightNoise(1e-3))
    opt.step()
    begun = [opt.state[p]["step"].item() for p in params]
    opt.step()
    assert [opt.state[p]["step"].item() for p in params] == [step + 1 for step in begun]
    again, other = mixed(noise=fusedcalib.GradientNoise(1e-3))
    other.step()
    assert other.state[again[0]]["step"] == 1


def test_learning_rate_zero_moves_nothing():
    params, opt = mixed()
    before = [p.detach().clone() for p in params]
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert opt.state[params[0]]["momentum_buffer"].any()


def test_other_live_sets_and_late_groups():
    params, opt = mixed()
    opt.step()
    params[0].grad = None
    kept = params[0].detach().clone()
    opt.step()
    assert torch.equal(params[0], kept)
    late = nn.Parameter(torch.zeros(4, 4))
    late.grad = torch.eye(4)
    opt.add_param_group({"params": [late]})
    opt.step()
    assert late.detach().diag().abs().min() > 0.5 * 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ns_steps": 100}, "ns_steps"),
        ({"ns_coefficients": (1.0, 2.0)}, "three numbers"),
        ({"adjust_lr_fn": "other"}, "adjust_lr_fn"),
        ({"coefficients": "cubic"}, "polar_express"),
        ({"nesterov": 1}, "nesterov"),
        ({"use_muon": None}, "use_muon"),
        ({"momentum": -0.1}, "momentum"),
        ({"lr": -1.0}, "learning rate"),
        ({"capturable": True}, "capturable"),
        ({"cautious": True}, "cautious=True compares"),
        ({"offload": "states"}, "offload|GPU"),
        ({"noise": fusedcalib.GradientNoise(0.1), "stochastic_rounding": True}, "stochastic_rounding"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_refuses_options(options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        fusedcalib.Muon(parameters((4, 4)), **options)


@pytest.mark.parametrize("centralize", [True, "update"])
def test_a_stack_is_centred_as_its_matrices_are(centralize):
    """To the last bit, with matrix_dims; and cautious decay goes by the orthogonalized update."""
    options = {"lr": 0.1, "backend": "eager", "centralize": centralize, "cautious_weight_decay": True}
    stack, *matrices = parameters((4, 6, 10), *[(6, 10)] * 4)
    stack.grad = torch.randn_like(stack)
    for i, p in enumerate(matrices):
        p.data.copy_(stack[i])
        p.grad = stack.grad[i].clone()
    fusedcalib.Muon([stack], matrix_dims=(-2, -1), **options).step()
    fusedcalib.Muon(matrices, **options).step()
    assert torch.equal(stack, torch.stack(list(matrices)))


def test_refuses_what_is_no_matrix():
    opt = fusedcalib.Muon(parameters((4, 4)))
    for p in (*parameters((4,)), nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))):
        with pytest.raises(ValueError, match="use_muon=False"):
            opt.add_param_group({"params": [p]})
    assert len(opt.param_groups) == 1


def test_refuses_parts_of_matrices(monkeypatch):
    monkeypatch.setattr("fusedcalib.matrices.check.is_spread", lambda p: True)
    with pytest.raises(ValueError, match="spread over ranks"):
        fusedcalib.Muon(parameters((4, 4)))


def test_refuses_gradient_release():
    model = nn.Linear(4, 4, bias=False)
    with pytest.raises(RuntimeError, match="cannot be released"):
        fusedcalib.enable_gradient_release(model, fusedcalib.Muon(model.parameters()))


def test_groups_of_a_model():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(9, 4),
            "hidden": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 3)),
            "output": nn.ModuleList([nn.ModuleDict({"output": nn.Linear(4, 4)}) for _ in range(2)]),
            "lm_head": nn.Linear(4, 9, bias=False),
        }
    )
    groups = fusedcalib.muon_groups(
        model, lr=0.02, adamw_lr=1e-3, weight_decay=0.1, adamw="*.1.output.weight"
    )
    found = {group["name"]: [name for name, _ in group["params"]] for group in groups}
    assert found["matrices"] == ["hidden.0.weight", "output.0.output.weight"]
    assert found["adamw"] == ["embed.weight", "hidden.2.weight", "output.1.output.weight", "lm_head.weight"]
    assert sum(map(len, found.values())) == len([*model.parameters()])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert [group["lr"] for group in groups] == [0.02, 1e-3, 1e-3]
    opt = fusedcalib.Muon(groups, backend="eager")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    with pytest.raises(ValueError, match="adamw: 'nothing'"):
        fusedcalib.muon_groups(model, adamw=["nothing"])
    with pytest.raises(TypeError, match="muon_groups"):
        fusedcalib.muon_groups(model.parameters())
