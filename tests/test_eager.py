"""Plain torch on a device that is not the host: a step is queued there, and nothing waits for the device."""

from contextlib import contextmanager

import pytest
import torch
from cases import SHAPES
from nn_cases import network
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedcalib import GradientNoise, LangevinNoise
from fusedcalib.executors import eager
from fusedcalib.nn import CSGD, VirtualConv2d, VirtualLinear, set_loss_scale, virtual

aten = torch.ops.aten
# They make a tensor of numbers in the host's memory and copy it, for which the host waits; not so torch.full.
FROM_NUMBERS = ("tensor", "as_tensor", "asarray")
OPTIONS = {
    "plain": {},
    "centralize": {"centralize": True, "l1": 0.1, "maximize": True},
    "update": {"centralize": "update", "max_row_norm": 0.5},
    "gradient noise": {"noise": GradientNoise(), "ema_decay": 0.9, "stochastic_rounding": True},
    "langevin": {"noise": LangevinNoise(), "state_dtype": torch.bfloat16},
}


class NoCopies(TorchDispatchMode):
    """Refuses copies between the host and a device, and numbers read from there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        places = {x.device.type for x in leaves if isinstance(x, torch.Tensor)}
        places |= {x.type for x in leaves if isinstance(x, torch.device)}
        if function.overloadpacket in (aten._to_copy, aten.copy_):
            assert len(places) < 2, f"{function} copies between the host and the device"
        assert function.overloadpacket is not aten._local_scalar_dense or places == {"cpu"}
        return function(*args, **(kwargs or {}))


@contextmanager
def unattended():
    """Nothing in it may copy between the host and a device, or wait for that."""

    def refusing(make):
        def made(data, *args, **options):
            device = torch.device(options.get("device") or "cpu")
            assert isinstance(data, torch.Tensor) or device.type == "cpu", f"{data} is copied to the device"
            return make(data, *args, **options)

        return made

    with pytest.MonkeyPatch.context() as patch, NoCopies():
        for name in FROM_NUMBERS:  # no mode sees what they do, nor what Tensor.backward calls
            patch.setattr(torch, name, refusing(getattr(torch, name)))
        yield


@pytest.fixture
def nowhere(monkeypatch):
    """Lets tensors without memory be stepped. What `sent` queues is taken to be there."""
    for check in ("engine.engine.check_parameter", "engine.engine.check_slots", "nn.csgd.check_parameter"):
        monkeypatch.setattr(f"fusedcalib.{check}", lambda *_: None)

    def sent(device, values):
        return torch.empty(values.shape, dtype=torch.from_numpy(values[:0]).dtype, device=device)

    monkeypatch.setattr(eager, "sent", sent)


def step_unattended(optimizer):
    """Two steps, of which the second finds everything made."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    with unattended():
        optimizer.step()
    assert optimizer.backend == "eager"
    assert {p.device.type for p in params} == {"meta"}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_queued(rule, options, dtype, nowhere):
    params = [torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in SHAPES]
    step_unattended(rule.ours(params, backend="eager", **{**rule.options, **options}))


@pytest.mark.parametrize("options", [{}, {"maximize": True, "branch_sign": "literal"}], ids=str)
def test_a_step_of_branch_weights_is_queued(options, nowhere):
    step_unattended(CSGD(network().to("meta"), lr=0.1, momentum=0.9, backend="eager", **options))


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "kernel"])
@pytest.mark.parametrize("scale", [4.0, torch.tensor(4.0)], ids=["number", "tensor of the host"])
def test_a_virtual_gradient_is_queued(fused, scale, monkeypatch):
    """The loss scale reaches the kernel as a tensor that the device fills."""
    monkeypatch.setattr(virtual, "runs_fused", lambda *_: fused)
    gains = []
    monkeypatch.setattr(virtual, "launch_virtual", lambda *given: gains.append(given[3]))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # a device without memory has none
    model = torch.nn.Sequential(VirtualConv2d(1, 2, 3, scale=0.1), VirtualLinear(4, 3, scale=0.1))
    set_loss_scale(model.to("meta"), scale)
    with unattended():
        model(torch.empty(5, 1, 6, 6, device="meta")).sum().backward()
    assert [(gain.device.type, gain.dtype) for gain in gains] == [("meta", torch.float32)] * fused


def test_what_waits_is_refused():
    """Each way of it that the tests above would find."""
    x = torch.empty(3, device="meta")
    waiting = (
        lambda: torch.as_tensor(1.0, device=x.device),
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: torch.ones(3).to(x.device),
        lambda: x.copy_(torch.ones(3)),
    )
    for wait in waiting:
        with pytest.raises(AssertionError), unattended():
            wait()
