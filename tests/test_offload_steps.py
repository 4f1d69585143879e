"""offload="states": the same bits as without, wherever states come from and go to.

Kernels are interpreted where there is no GPU, and tests/offload_host.py stands in for pinned memory.
"""

import copy
import io
import math
import pickle

import pytest
import torch
from cases import prepared
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
    values,
)
from rule_cases import RULES
from storage_runs import BYTES, KEPT, weights

from fusedcalib.executors.triton import pinned

pytestmark = TRITON.marks
SHAPES = ((20, 100), (9,), ())  # rows of a block and a part of one, a vector, a number
AROUND = {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "centralize": True}


@pytest.fixture
def host(monkeypatch):
    return Host(monkeypatch)


def pair(**options):
    """The same run with states on the host and without."""
    start = weights(shapes=SHAPES)
    return [made(on_device(start), **options, offload=where) for where in ("states", None)]


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


@pytest.mark.parametrize("kind", ["split16", "split8 at random, 8bit", "float32, 8bit"])
def test_the_same_bits_as_without(host, kind):
    """Clipped, averaged, with a scheduler, over two accumulated gradients and a step that is left out."""
    runs = pair(**KEPT[kind], **AROUND)
    schedulers = [torch.optim.lr_scheduler.StepLR(run, 1, 0.5) for run in runs]
    for number in range(3):
        for run, scheduler in zip(runs, schedulers, strict=True):
            generator = torch.Generator().manual_seed(number)
            for p in params_of(run):
                p.grad = torch.zeros_like(p)
                for _ in range(2):
                    p.grad += torch.randn(p.shape, generator=generator).to(DEVICE, p.dtype)
            if number == 1:
                params_of(run)[0].grad[0, 0] = math.inf
            run.step()
            scheduler.step()
        assert_on_host(runs[0])
    assert [int(run.skipped_steps) for run in runs] == [1, 1]
    assert runs[0].grad_norm == runs[1].grad_norm
    assert_same(*runs)


@pytest.mark.parametrize("name", RULES)
def test_every_state_of_every_rule(host, name):
    """Made in pinned memory before the first launch, with the parameter's strides; and nothing else is."""
    rule = RULES[name]
    options = {k: v for k, v in rule.options.items() if k != "lr"} | {"ema_decay": 0.5}
    params = on_device(torch.randn(7, 5).t() for _ in range(2))
    optimizer = made(params, name, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    prepared(optimizer)
    assert_on_host(optimizer)
    assert len(states_of(optimizer)) == len(params) * (1 + len(rule.moments) + len(rule.of_rows))
    assert len(host.told("memory")) == len(states_of(optimizer))
    whole = [t for t in states_of(optimizer) if t.ndim == 2]  # a row has a number of its own, if any
    assert {t.stride() for t in whole} == {params[0].stride()}


@pytest.mark.parametrize("name", ["AdamW", "AdamMini"])
def test_the_allocator_is_told_of_every_stream_before_a_launch(host, name):
    optimizer = made(on_device(weights(shapes=SHAPES[:2])), name, **BYTES)
    train(optimizer, 1)
    addresses = {t.data_ptr() for t in states_of(optimizer)}
    first = host.told("use")
    assert {address for _, address, _ in first} == addresses
    assert len(first) == len(addresses) * len({stream for *_, stream in first})
    train(optimizer, 2)
    assert not host.told("use")  # it knows
    if not GPU:
        host.streams = {"default", "side"}
        train(optimizer, 3)
        assert {(address, stream) for _, address, stream in host.told("use")} == {
            (address, "side") for address in addresses
        }
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, 4)
    assert {address for _, address, _ in host.told("use")} == {t.data_ptr() for t in states_of(optimizer)}


def test_a_failure_before_the_launch_tells_nothing_and_keeps_nothing(host, monkeypatch):
    """Without memory for one of the states nothing is made, and the next step begins anew."""
    optimizer, alone = pair()
    calls = []

    def memory(t, dtype):
        calls.append(t)
        if len(calls) == 4:
            raise MemoryError
        return host.memory(t, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(pinned, "memory", memory)
        with pytest.raises(MemoryError):
            train(optimizer, 1)
    assert not optimizer.state
    assert not host.told("use")
    for run in (optimizer, alone):
        train(run, 1, 2)
    assert_same(optimizer, alone)


LOOKS = {
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "expanded": lambda optimizer: optimizer.expanded_state_dict(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("look", LOOKS)
def test_the_host_waits_before_it_reads(host, look):
    for optimizer, waits in zip(pair(**BYTES), (True, False), strict=True):
        train(optimizer, 1)
        host.events.clear()
        LOOKS[look](optimizer)
        assert bool(host.told("wait")) == waits


def test_copies_are_offloaded_too(host):
    """Their states begin in plain memory, and are pinned by the first step."""
    optimizer, alone = pair(**BYTES)
    for run in (optimizer, alone):
        train(run, 1)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for one in copies:
        assert one.offload == "states"
        assert not any(map(pinned.is_pinned, states_of(one)))
        train(one, 2)
        assert_on_host(one)
    train(optimizer, 2)
    train(alone, 2)
    for one in (optimizer, *copies):
        assert_same(one, alone)


def casts(patch):
    """How many elements each tensor has that torch.optim's loading brings to the device."""
    seen, name = [], "_process_value_according_to_param_policy"
    cast = getattr(torch.optim.Optimizer, name)

    def noted(param, value, *rest):
        seen.append(value.numel())
        return cast(param, value, *rest)

    patch.setattr(torch.optim.Optimizer, name, staticmethod(noted))
    return seen


@pytest.mark.parametrize("begun", [0, 1], ids=["fresh", "begun"])
@pytest.mark.parametrize("kind", ["split8, 8bit", "plain"])
def test_checkpoints_of_either_go_on_in_the_other(host, begun, kind, monkeypatch):
    """Without a state of the checkpoint on the way to the device."""
    sources = pair(**KEPT.get(kind, {"state_dtype": "float32"}))
    targets = pair(**KEPT.get(kind, {"state_dtype": "float32"}))
    saved = []
    for source in sources:
        train(source, 1, 2)
        saved.append((through_a_file(source.state_dict()), [p.detach().clone() for p in params_of(source)]))
    for target, (state, weights_then) in zip(targets, saved[::-1], strict=True):
        train(target, *range(7, 7 + begun))
        with monkeypatch.context() as patch:
            seen = casts(patch)
            target.load_state_dict(state)
        assert (max(seen) > 1) == (target.offload is None)
        with torch.no_grad():
            for p, q in zip(params_of(target), weights_then, strict=True):
                p.copy_(q)
        train(target, 3)
    assert_on_host(targets[0])
    for source in sources:
        train(source, 3)
    assert_same(targets[0], sources[0])
    assert_same(targets[1], sources[0])


def test_a_checkpoint_of_torch_keeps_its_wide_states(host):
    """Those of a bf16 parameter stay fp32, in the keys and their order that torch has."""
    params = on_device(weights(shapes=SHAPES[:2]))
    theirs = torch.optim.AdamW([torch.nn.Parameter(p.detach().float()) for p in params], lr=0.01)
    train(theirs, 1)
    optimizer = made(params)
    optimizer.load_state_dict(through_a_file(theirs.state_dict()))
    assert_on_host(optimizer)
    train(optimizer, 2)
    assert_on_host(optimizer)
    assert {t.dtype for t in states_of(optimizer)} == {torch.float32}
    assert [*optimizer.state[params[0]]] == ["step", "exp_avg", "exp_avg_sq"]


def test_what_is_pinned_is_taken_over_as_it_lies(host):
    """As torch.optim's class does with what is on the device already: DCP loads into such a state dict."""
    optimizer = made(on_device(weights(shapes=SHAPES[:1])), **BYTES)
    train(optimizer, 1)
    before = [t.data_ptr() for t in states_of(optimizer)]
    template = optimizer.state_dict()
    template["state"][0]["exp_avg_codes"].fill_(7)
    host.events.clear()
    optimizer.load_state_dict(template)
    assert [t.data_ptr() for t in states_of(optimizer)] == before
    assert not host.told("memory")
    assert (optimizer.state[params_of(optimizer)[0]]["exp_avg_codes"] == 7).all()


def test_a_checkpoint_that_does_not_fit_into_memory_changes_nothing(host, monkeypatch):
    optimizer = made(on_device(weights(shapes=SHAPES)), **BYTES)
    train(optimizer, 1)
    saved, before = through_a_file(optimizer.state_dict()), values(optimizer)
    saved["param_groups"][0]["lr"] = 7.0
    train(optimizer, 2)
    before, entries = values(optimizer), dict(optimizer.state)

    def memory(t, dtype):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pinned, "memory", memory)
        with pytest.raises(MemoryError):
            optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert dict(optimizer.state) == entries
    torch.testing.assert_close(values(optimizer), before, rtol=0, atol=0)
    train(optimizer, 3)


def test_conversions_stay_on_the_host(host):
    """Of states and of what is beside parameters, to and fro; the bits are those without."""
    runs = pair(**KEPT["split8, 8bit"])
    changes = [
        {"state_dtype": "float32", "master_weights": "split16"},
        {"state_dtype": "8bit", "master_weights": "float32"},
        {"state_dtype": "bfloat16_stochastic", "master_weights": "none"},
    ]
    for number, change in enumerate(({}, *changes)):
        for run in runs:
            run.param_groups[0].update(change)
            train(run, number)
        assert_on_host(runs[0])
    assert_same(*runs)


def test_averages_and_master_weights_come_out_beside_the_parameters(host):
    options = {**KEPT["split8, 8bit"], "ema_decay": 0.5}
    found = []
    for optimizer in pair(**options):
        model = torch.nn.ParameterList(params_of(optimizer))
        train(optimizer, 1, 2)
        masters = optimizer.master_state_dict(model)
        assert {t.device.type for t in masters.values()} == {DEVICE}
        with optimizer.ema_weights():
            averages = [p.detach().clone() for p in model]
        expanded = optimizer.expanded_state_dict()["state"]
        found.append((masters, averages, [entry["exp_avg"].cpu() for entry in expanded.values()]))
        if optimizer.offload:
            assert {entry["exp_avg"].device.type for entry in expanded.values()} == {"cpu"}
        optimizer.load_master_state_dict(model, {k: 2 * v for k, v in masters.items()})
        train(optimizer, 3)
        found[-1] += (values(optimizer),)
        if optimizer.offload:
            assert_on_host(optimizer)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_bytes_and_names_say_where_states_lie(host):
    optimizer, alone = pair(**KEPT["split8, 8bit"])
    for run in (optimizer, alone):
        train(run, 1)
    found, expected = optimizer.state_bytes(), alone.state_bytes()
    states = sum(t.numel() * t.element_size() for t in states_of(optimizer))
    assert (
        found.pop("host")
        == states
        == sum(expected.values())
        - expected["total"]
        - sum(expected[key] for key in ("parameters", "gradients", "step"))
    )
    assert found == expected
    assert "offload: states" in repr(optimizer)
    assert "offload" not in repr(alone)
