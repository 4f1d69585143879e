"""The drop-in contract: schedulers, gradient scalers and averaging run as in torch."""

import pytest
import torch
from cases import DEVICE, assert_identical, snapshot
from rule_cases import each_few
from torch.optim import lr_scheduler as schedule

STEPS = 6


def has_momentum(optimizer):
    return not {"momentum", "betas"}.isdisjoint(optimizer.defaults)


SCHEDULERS = {
    "LambdaLR": lambda o: schedule.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: schedule.MultiplicativeLR(o, lambda epoch: 0.9),
    "CosineAnnealingLR": lambda o: schedule.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: schedule.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: schedule.OneCycleLR(
        o, 0.2, total_steps=STEPS + 1, cycle_momentum=has_momentum(o)
    ),
    "CyclicLR": lambda o: schedule.CyclicLR(o, 0.01, 0.2, 2, cycle_momentum=has_momentum(o)),
    "ReduceLROnPlateau": lambda o: schedule.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedule.SequentialLR(
        o, [schedule.LinearLR(o, 0.1, total_iters=2), schedule.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: schedule.ChainedScheduler(
        [schedule.ConstantLR(o, 0.1, 2), schedule.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=3),
}


def hyperparameters(optimizer):
    keys = ("lr", "momentum", "betas")
    return [{k: group[k] for k in keys if k in group} for group in optimizer.param_groups]


@each_few
@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_c03_schedulers(rule, twin, name, tensor):
    lr = rule.options["lr"]
    built = twin(
        arrange=lambda params: [
            {"params": params[:2], "lr": torch.tensor(lr) if tensor else lr},
            {"params": params[2:]},
        ]
    )
    schedulers = [SCHEDULERS[name](optimizer) for optimizer, _ in built.sides]
    seen = []
    for _ in range(STEPS):
        built.step()
        for scheduler in schedulers:
            scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])
        assert hyperparameters(built.ours) == hyperparameters(built.theirs)
        seen.append(float(built.ours.param_groups[1]["lr"]))
    built.check()
    assert len(set(seen)) > 1, "the schedule changed nothing: this proves nothing"


@each_few
@pytest.mark.parametrize("fused", [False, True], ids=["unscaled by the scaler", "fused"])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "clipped"])
def test_c25_grad_scaler(rule, twin, fused, unscale):
    """Scaled gradients, one overflow: the same parameters, state and scale as torch's class."""
    built = twin(**{"fused": fused} if rule.takes("fused") else {})
    scalers = [torch.amp.GradScaler(DEVICE, init_scale=256.0, growth_interval=2) for _ in (0, 1)]
    for overflow in (False, True, False, False):
        inputs = [torch.randn_like(p) for p in built.params]
        if overflow:
            inputs[1][3] = float("inf")
            before = snapshot(built.ours)
        for scaler, (optimizer, params) in zip(scalers, built.sides, strict=True):
            optimizer.zero_grad()
            loss = sum((p * x).sum() for p, x in zip(params, inputs, strict=True))
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
        built.steps += 1
        if overflow:
            assert_identical(snapshot(built.ours), before)
    built.check()
    assert scalers[0].get_scale() == scalers[1].get_scale() < 512


def test_averaged_model_and_swa(rule, ours):
    """The usual loop around a module runs to its end, and the average is of the stepped weights."""
    model = torch.nn.Linear(4, 3, device=DEVICE)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = ours(model.parameters())
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4, device=DEVICE)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
        seen.append(model.weight.detach().clone())
    torch.testing.assert_close(averaged.module.weight, torch.stack(seen).mean(0))
