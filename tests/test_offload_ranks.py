"""offload="states" under FSDP2; and what only a GPU can tell: who uses memory when, what comes to it."""

import copy
import gc
from weakref import ref

import pytest
import torch
from cases import assert_identical
from kernel_cases import GPU, TRITON
from offload_host import (
    DEVICE,
    Host,
    assert_on_host,
    assert_same,
    made,
    on_device,
    params_of,
    states_of,
    train,
)
from storage_runs import BYTES, KEPT, weights
from torch import distributed

from fusedcalib.executors.triton import pinned
from fusedcalib.layout.shards import is_spread, local_of

pytestmark = TRITON.marks
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture
def host(monkeypatch):
    return Host(monkeypatch)


@pytest.fixture
def alone():
    """A group of this one process."""
    backend = "cpu:gloo,cuda:nccl" if GPU else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")
def test_fsdp2_and_distributed_checkpoints(host, alone, tmp_path):
    """Parts of states lie on the host; DCP reads into them, and a whole state dict is taken apart again."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as api
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def run(offload):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(100, 20), torch.nn.Linear(20, 3))
        model.to(DEVICE, torch.bfloat16)
        fully_shard(model, mesh=init_device_mesh(DEVICE, (1,)), reshard_after_forward=True)
        return model, made(model.parameters(), offload=offload, max_grad_norm=1.0, **KEPT["split8, 8bit"])

    def step(model, optimizer, *numbers):
        for number in numbers:
            torch.manual_seed(number)
            model(torch.randn(8, 100).to(DEVICE, torch.bfloat16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def on_host(optimizer):
        assert all(map(is_spread, states_of(optimizer)))
        return all(pinned.is_pinned(local_of(t)) for t in states_of(optimizer))

    def whole(model, optimizer):
        options = api.StateDictOptions(full_state_dict=True, cpu_offload=True)
        return copy.deepcopy(api.get_state_dict(model, optimizer, options=options))

    def same(found, expected):
        (weights, state), (weights_expected, state_expected) = found, expected
        assert_identical(weights, weights_expected)
        assert_identical(state["state"], state_expected["state"])

    (model, optimizer), other = run("states"), run(None)
    for each in ((model, optimizer), other):
        step(*each, 1, 2)
    assert on_host(optimizer)
    expected = whole(model, optimizer)
    same(expected, whole(*other))
    weights_then, state = api.get_state_dict(model, optimizer)
    dcp.save({"model": weights_then, "optimizer": state}, checkpoint_id=tmp_path)
    step(model, optimizer, 3)
    after = whole(model, optimizer)
    for how in ("parts", "whole"):
        model, optimizer = run("states")
        (weights_then, state), options = copy.deepcopy(expected), None
        if how == "whole":
            options = api.StateDictOptions(full_state_dict=True)
        else:
            weights_then, state = api.get_state_dict(model, optimizer)
            dcp.load({"model": weights_then, "optimizer": state}, checkpoint_id=tmp_path)
        loaded = {"model_state_dict": weights_then, "optim_state_dict": state}
        api.set_state_dict(model, optimizer, **loaded, options=options)
        assert on_host(optimizer)
        same(whole(model, optimizer), expected)
        step(model, optimizer, 3)
        assert on_host(optimizer)
        same(whole(model, optimizer), after)


# -- on a GPU alone -------------------------------------------------------------------------------


def pair(**options):
    start = weights(shapes=((64, 1024), (9,)))
    return [made(on_device(start), **options, offload=where) for where in ("states", None)]


@gpu
def test_pinned_memory_has_the_devices_addresses(host):
    assert pinned.why_not(torch.device("cuda", torch.cuda.current_device())) is None


def stepped_later(optimizer):
    """Queues a step behind a second of nothing: the host is long done with it."""
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # cycles
    optimizer.step()


@gpu
def test_memory_of_what_is_dropped_is_not_given_away_while_a_step_uses_it():
    """The host drops the optimizer and takes pinned memory of the same size."""
    optimizer = pair()[0]
    train(optimizer, 1)
    sizes, dropped = [t.numel() * t.element_size() for t in states_of(optimizer)], ref(optimizer)
    stepped_later(optimizer)
    del optimizer
    gc.collect()
    assert dropped() is None
    taken = [torch.full((size,), 7, dtype=torch.uint8, pin_memory=True) for size in sizes]
    torch.cuda.synchronize()
    assert all((t == 7).all() for t in taken)


@gpu
def test_the_host_reads_what_the_last_step_has_written():
    runs = pair(**BYTES)
    for run in runs:
        train(run, 1)
    stepped_later(runs[1])
    stepped_later(runs[0])
    found, expected = (copy.deepcopy(run.state_dict()["state"]) for run in runs)
    for mine, other in zip(found.values(), expected.values(), strict=True):
        assert_identical({k: t.cpu() for k, t in mine.items()}, {k: t.cpu() for k, t in other.items()})


@gpu
def test_a_step_on_a_side_stream_and_a_captured_one():
    runs = pair(capturable=True, max_grad_norm=1.0)
    stream = torch.cuda.Stream()
    for run in runs:
        with torch.cuda.stream(stream):
            train(run, 1, 2)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run.step()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    assert_on_host(runs[0])
    assert {entry["step"].device.type for entry in runs[0].state.values()} == {DEVICE}
    assert_same(*runs)


@gpu
def test_neither_a_step_nor_loading_brings_states_to_the_device():
    """Nothing more than one parameter's state is taken of its memory."""
    params = on_device(torch.zeros(1024, 1024) for _ in range(8))
    optimizer = made(params)
    train(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for p in params:
        p.grad = torch.zeros_like(p)
    for act in (optimizer.step, lambda: optimizer.load_state_dict(saved), optimizer.step):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        act()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 4 * params[0].numel()
