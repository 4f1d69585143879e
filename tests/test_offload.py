"""offload="states": who gets it and who does not; which device each tensor of a state is on.

The parameters of the last part are torch's fake tensors on another device: they have no memory, but where one
meets a tensor on the host in an operation it raises, as on a GPU.
"""

import itertools
import pickle

import pytest
import torch
from cases import assert_identical, parameters, snapshot, train
from kernel_cases import GPU
from offload_host import COUNTS, Host, made
from storage_runs import KEPT, LEAST
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fusedcalib
from fusedcalib.engine.checks import check_parameter
from fusedcalib.engine.state import make_state
from fusedcalib.executors.triton import pinned
from fusedcalib.layout.recipe import recipe_of
from fusedcalib.layout.shards import like, local_of, with_local

PLAIN = {"state_dtype": "float32"}
FORMS = {"plain": PLAIN, **KEPT}
BACKWARDS = [*FORMS][::-1]
AWAY = "meta"  # any device but the CPU that this build of torch knows
NOTHING = {"state_dtype": "parameter", "master_weights": "none", "stochastic_rounding": False}


@pytest.mark.skipif(GPU, reason="is about machines without a GPU")
def test_it_is_refused_where_torch_sees_no_gpu():
    with pytest.raises(ValueError, match="needs a GPU, and torch sees none here; leave offload out"):
        fusedcalib.AdamW(parameters(), offload="states")


@pytest.mark.parametrize("backend", ["numba", "eager"])
def test_it_is_refused_with_executors_of_a_cpu(backend):
    with pytest.raises(ValueError, match=f"which backend='{backend}' has not; use backend='auto'"):
        fusedcalib.AdamW(parameters(), offload="states", backend=backend)


@pytest.mark.parametrize("value", [True, "step", 1])
def test_it_is_refused_as_anything_else(value):
    with pytest.raises(ValueError, match=r'Invalid offload value: .*, expected "states" or None'):
        fusedcalib.AdamW(parameters(), offload=value)


def test_a_param_group_cannot_have_it():
    """Neither at construction nor later; in silence it would do nothing."""
    optimizer = fusedcalib.AdamW(parameters(), backend="eager")
    with pytest.raises(ValueError, match="a param group has offload, which is of the whole optimizer"):
        optimizer.add_param_group({"params": parameters(((2, 2),)), "offload": "states"})
    optimizer.param_groups[0]["offload"] = "states"
    with pytest.raises(ValueError, match="give it to the constructor"):
        train(optimizer)


def test_it_cannot_be_switched():
    optimizer = fusedcalib.AdamW(parameters(), backend="eager")
    assert optimizer.offload is None
    with pytest.raises(AttributeError):
        optimizer.offload = "states"


def test_what_the_cpu_steps_is_refused_before_anything_is_changed(monkeypatch):
    """As where a model has been left on the host beside a GPU."""
    Host(monkeypatch)
    params = parameters(device="cpu")
    optimizer = made(params, backend="auto")
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"one on cpu is stepped by (numba|eager); move the model to a"):
        train(optimizer)
    assert_identical(snapshot(optimizer), before)
    assert not optimizer.state


def test_a_gpu_without_unified_addressing_is_refused(monkeypatch):
    class Triton:
        name, launches = "triton", True

    Host(monkeypatch)
    monkeypatch.setattr(pinned, "why_not", lambda device: f"needs unified addressing, which {device} has not")
    from fusedcalib.engine.offload import reaching_host

    with pytest.raises(RuntimeError, match="offload='states' needs unified addressing, which cuda:1 has not"):
        reaching_host("AdamW", Triton(), torch.device("cuda", 1))


@pytest.mark.parametrize(
    ("code", "offset", "reached"), [(0, 0, True), (0, 64, False), (1, 0, False), (201, 0, True)]
)
def test_the_driver_is_asked_for_the_address_on_the_device(code, offset, reached, monkeypatch):
    """It must be the host's, or kernels would write elsewhere; 1: there is none, 201: it cannot be asked."""

    class Driver:
        @staticmethod
        def cuPointerGetAttribute(into, attribute, address):  # noqa: N802
            into._obj.value = address.value + offset
            return code

    monkeypatch.setattr(pinned.ctypes, "CDLL", lambda name: Driver)
    assert pinned._device_address(4096) == reached


@pytest.mark.skipif(GPU, reason="pins whatever there is")
def test_memory_that_cannot_be_pinned_is_said():
    with pytest.raises(RuntimeError, match=r"24 bytes of the host's memory cannot be pinned \(.*8bit"):
        pinned.memory(torch.zeros(2, 3), torch.float32)


def test_an_optimizer_pickled_before_there_was_such():
    optimizer = fusedcalib.AdamW(parameters(), backend="eager")
    state = optimizer.__getstate__()
    del state["_offload"]
    revived = fusedcalib.AdamW.__new__(fusedcalib.AdamW)
    revived.__setstate__(pickle.loads(pickle.dumps(state)))
    assert revived.offload is None
    train(revived)


# -- which device ---------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A parameter elsewhere, fake as all that is made within the test."""
    Host(monkeypatch)
    monkeypatch.setattr(pinned, "is_pinned", lambda t: t.device.type == "cpu")
    monkeypatch.setattr(pinned, "memory", lambda t, dtype: torch.empty_like(t, dtype=dtype, device="cpu"))
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda t: 16)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        param = torch.empty(20, 100, device=AWAY, dtype=torch.bfloat16)
        param.grad = torch.empty_like(param)
        yield param


def states_made(optimizer, param):
    """What a step makes, converts and checks before it is laid out."""
    (group,) = optimizer.param_groups
    recipe = recipe_of(optimizer.rule, group)
    check_parameter("it", param, recipe, optimizer.state.get(param, {}), offload=True)
    make_state(optimizer.state, optimizer._engine.versions, param, recipe, group)
    return {name: t.device.type for name, t in optimizer.state[param].items() if name not in COUNTS}


@pytest.mark.parametrize(
    ("before", "after"), [*itertools.pairwise(FORMS), *itertools.pairwise([*FORMS][::-1])]
)
def test_states_are_made_and_converted_on_the_host(gpu, before, after):
    """Of which the device sees one at a time; what is computed is computed there."""
    optimizer = made([gpu], ema_decay=0.5, **FORMS[before])
    assert {*states_made(optimizer, gpu).values()} == {"cpu"}
    optimizer.param_groups[0].update({**NOTHING, **FORMS[after], **LEAST})
    assert {*states_made(optimizer, gpu).values()} == {"cpu"}


@pytest.mark.parametrize("kind", FORMS)
def test_states_on_the_device_move_to_the_host(gpu, kind):
    """As those of a checkpoint that torch has loaded, or that are made beforehand."""
    optimizer = made([gpu], **FORMS[kind])
    states_made(optimizer, gpu)
    entry = optimizer.state[gpu]
    entry.update({name: t.to(gpu.device) for name, t in entry.items() if name not in COUNTS})
    assert {*states_made(optimizer, gpu).values()} == {"cpu"}


@pytest.mark.parametrize("kind", FORMS)
def test_loading_and_saving_leave_them_there(gpu, kind):
    optimizer = made([gpu], ema_decay=0.5, **FORMS[kind])
    states_made(optimizer, gpu)
    saved = optimizer.state_dict()
    other = made([gpu], ema_decay=0.5, **FORMS[kind])
    other.load_state_dict(saved)
    expanded = other.expanded_state_dict()
    for found in (saved["state"][0], other.state[gpu], expanded["state"][0]):
        assert {t.device.type for t in found.values()} == {"cpu"}
    assert {*states_made(other, gpu).values()} == {"cpu"}


def test_averages_and_master_weights_are_used_on_the_device(gpu):
    optimizer = made([gpu], ema_decay=0.5, **KEPT["split8, 8bit"])
    states_made(optimizer, gpu)
    with optimizer.ema_weights():
        pass
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(gpu, requires_grad=False)
    optimizer.state[model.weight] = optimizer.state[gpu]
    assert optimizer.master_state_dict(model)["weight"].device.type == AWAY
    optimizer.refresh_master_weights()


# -- parts of a whole -----------------------------------------------------------------------------


class Part:
    """What is asked of a DTensor over GPUs."""

    def __init__(self, mesh, local):
        from torch.distributed.tensor import Shard

        self.device_mesh, self.placements, self._local_tensor = mesh, (Shard(0),), local
        self.shape, self.ndim = torch.Size((2 * len(local), *local.shape[1:])), local.ndim

    def stride(self):
        return self._local_tensor.stride()


def test_a_part_of_a_state_stays_where_it_lies():
    """DTensor.from_local would move it to the devices of the mesh."""
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cuda", [0, 1], _init_backend=False, _rank=0)
    local = torch.zeros(3, 5)
    param = Part(mesh, local)
    for shape, stride in ((None, (5, 1)), ((6, 2), (2, 1))):
        state = like(param, local, shape)
        assert local_of(state) is local
        assert (tuple(state.shape), state.stride()) == (shape or (6, 5), stride)
        assert (state.device_mesh, state.placements) == (mesh, param.placements)
    other = torch.ones(3, 2)
    again = with_local(state, other)
    assert local_of(again) is other
    assert (again.shape, again.placements) == (state.shape, state.placements)
