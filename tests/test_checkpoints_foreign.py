"""Checkpoints of bitsandbytes and torchao are decoded to what they stand for, loaded and stepped."""

import copy
import doctest
import math
from typing import Any

import pytest
import torch
from foreign_cases import FORMS, SHAPES, bitsandbytes, dynamic_map, torchao, torchao_state
from torch import Tensor

import fusedcalib
from fusedcalib import checkpoints
from fusedcalib.checkpoints import from_bitsandbytes, from_torchao


def trained(cls: Any, found: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, list[Tensor]]:
    """An optimizer that has loaded a dict and made a step, and its parameters; the same ones each time."""
    generator = torch.Generator().manual_seed(5)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = cls(
        params, lr=1.0, **({"backend": "eager"} if cls.__module__.startswith("fusedcalib") else {})
    )
    optimizer.load_state_dict(found)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    optimizer.step()
    return optimizer, [param.detach() for param in params]


# -- bitsandbytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_two_states_of_bitsandbytes_are_adams(form: str) -> None:
    given, values = bitsandbytes(2, form)
    kept = copy.deepcopy(given)
    found = from_bitsandbytes(given)
    for i, (m, v) in enumerate(values):
        entry = found["state"][i]
        assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(entry["exp_avg"], m)
        assert torch.equal(entry["exp_avg_sq"], v)
        assert (entry["step"].dtype, entry["step"].item()) == (torch.float32, 3)
    (group,) = found["param_groups"]
    assert group["betas"] == (0.9, 0.99)
    assert group["initial_lr"] == 0.02
    assert "t_alpha" not in group
    torch.testing.assert_close(given, kept, rtol=0, atol=0)


ONE = {"Lion": "exp_avg", "SGD": "momentum_buffer", "RMSprop": "square_avg", "Adagrad": "sum"}
OPTIONS = {
    "Lion": {"betas": (0.9, 0.99)},
    "SGD": {"momentum": 0.9, "dampening": 0.0, "nesterov": False},
    "RMSprop": {"alpha": 0.9, "momentum": 0.0, "centered": False, "eps": 1e-8},
    "Adagrad": {"lr_decay": 0.0, "eps": 1e-8},
}


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("form", FORMS)
def test_one_state_of_bitsandbytes_is_that_of_the_optimizer_named(name: str, form: str) -> None:
    given, values = bitsandbytes(1, form)
    found = from_bitsandbytes(given, name)
    for i, (x,) in enumerate(values):
        assert torch.equal(found["state"][i].pop(ONE[name]), x)
        assert found["state"][i].keys() == ({"step"} if name in ("RMSprop", "Adagrad") else set())
    (group,) = found["param_groups"]
    assert group.items() >= OPTIONS[name].items()


@pytest.mark.parametrize("name", ["Adam", "AdamW", *ONE])
def test_what_bitsandbytes_saved_is_loaded_and_stepped(name: str) -> None:
    given, values = bitsandbytes(1 if name in ONE else 2, "256")
    found = from_bitsandbytes(given, name)
    optimizer, params = trained(getattr(fusedcalib, name), copy.deepcopy(found))
    assert optimizer.param_groups[0]["lr"] == 0.01
    if name != "Lion":
        reference = trained(getattr(torch.optim, name), copy.deepcopy(found))[1]
        torch.testing.assert_close(params, reference, rtol=1e-5, atol=1e-6)
    m, g = values[0][0], optimizer.param_groups[0]["params"][0].grad
    if name in ("Adam", "AdamW", "Lion"):
        kept = 0.9 if name != "Lion" else 0.99
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]
        torch.testing.assert_close(state, kept * m + (1 - kept) * g, rtol=1e-5, atol=1e-6)


def test_adam_of_bitsandbytes_decays_as_adamw() -> None:
    found = from_bitsandbytes(bitsandbytes(2, "256")[0], "Adam")
    adam, adamw = (trained(getattr(fusedcalib, name), copy.deepcopy(found))[1] for name in ("Adam", "AdamW"))
    assert all(torch.equal(a, b) for a, b in zip(adam, adamw, strict=True))


# -- torchao ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["8bit", "4bit", "fp8"])
def test_states_of_torchao_are_decoded(kind: str) -> None:
    given, values = torchao(kind)
    assert [hasattr(entry["exp_avg"], "codes") for entry in given["state"].values()] == [
        kind == "4bit",
        True,
        False,
        False,
    ]
    found = from_torchao(given)
    for i, expected in enumerate(values):
        for name, value in expected.items():
            assert torch.equal(found["state"][i][name], value)
            assert found["state"][i][name].dtype == torch.float32
        assert found["state"][i]["step"].item() == 3
    assert found["param_groups"][0]["lr"] == 0.25
    assert isinstance(given["param_groups"][0]["lr"], Tensor)
    assert isinstance(found["param_groups"][0]["lr"], float)


@pytest.mark.parametrize("kind", ["8bit", "4bit", "fp8"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_what_torchao_saved_is_loaded_and_stepped(kind: str, name: str) -> None:
    found = from_torchao(torchao(kind)[0])
    ours, theirs = (
        trained(getattr(where, name), copy.deepcopy(found))[1] for where in (fusedcalib, torch.optim)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_moments_of_bf16_parameters_stay_fp32_in_ours() -> None:
    found = from_torchao(torchao("8bit")[0])
    optimizer = trained(fusedcalib.AdamW, found, torch.bfloat16)[0]
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}


def test_dtensors_of_torchao_stay_dtensors(tmp_path: Any) -> None:
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("a torch without torch.distributed")
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        local, value = torchao_state((64, 64), True, "8bit")
        mesh = init_device_mesh("cpu", (1,))
        state = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
        found = from_torchao({"state": {0: {"exp_avg": state}}, "param_groups": []})["state"][0]["exp_avg"]
        assert isinstance(found, DTensor)
        assert found.placements == (Shard(0),)
        assert torch.equal(found.to_local(), value)
    finally:
        distributed.destroy_process_group()


# -- both -------------------------------------------------------------------------------------


def test_the_map_is_the_published_one() -> None:
    """By what is known of it: 0 and 1 exactly, 7 decades, and how many numbers each has."""
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert len(signed) == len(unsigned) == 256
    assert (signed == 0).sum() == (unsigned == 0).sum() == 1
    assert signed.max() == unsigned.max() == 1
    assert math.isclose(signed.min(), -0.9929687, rel_tol=1e-6)
    for decade in range(7):
        low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        assert ((signed > low) & (signed < high)).sum() == 2**decade
        assert ((unsigned > low) & (unsigned < high)).sum() == 2 ** (decade + 1)


def test_examples_of_the_docs() -> None:
    found = doctest.testmod(checkpoints)
    assert found.attempted > 0
    assert found.failed == 0
