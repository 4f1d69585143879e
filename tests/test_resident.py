"""What a plan has on a device: sent again only where it changed, kept while a stream reads it."""

import gc

import numpy
import pytest
import torch
from cases import DEVICE, parameters

import fusedcalib
from fusedcalib.executors.triton import resident as mirror


def test_what_could_not_be_sent_is_sent_the_next_time(monkeypatch):
    """As out of memory: the host must not take it for what the device has."""
    values = numpy.arange(4)
    array = mirror.DeviceArray(torch.device("cpu"), values)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "from_numpy", lambda values: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            array.update(values + 1)
    array.update(values + 1)
    assert array.tensor.tolist() == [1, 2, 3, 4]


class There(torch.Tensor):
    """A tensor that says that it lies on a GPU."""

    device = property(lambda self: torch.device("cuda", 0))


class Event:
    done = False

    def record(self, stream):
        pass

    def query(self):
        return self.done


@pytest.fixture
def pinned(monkeypatch):
    """The pinned buffers that are taken, and the events that say when a copy of one is done."""
    buffers, events = [], []

    def empty(shape, dtype, device, pin_memory=False):
        made = torch.zeros(shape, dtype=dtype)
        if pin_memory:
            buffers.append(made)
        return made.as_subclass(There) if torch.device(device).type == "cuda" else made

    def event():
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(mirror.torch, "empty", empty)
    monkeypatch.setattr(mirror, "_event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    return buffers, events


def test_pinned_buffers_take_turns(pinned):
    """None is written while it is still being read, none is waited for, none is taken without need."""
    buffers, events = pinned
    values = numpy.arange(4, dtype=numpy.int64)
    array = mirror.DeviceArray(torch.device("cuda", 0), values)
    array.update(values)  # the same
    assert len(buffers) == 1
    array.update(values + 1)
    assert [b.tolist() for b in buffers] == [[0, 1, 2, 3], [1, 2, 3, 4]]
    for e in events:
        e.done = True
    address = array.tensor.data_ptr()
    for i in range(2, 8):
        array.update(values + i)
        assert array.tensor.tolist() == (values + i).tolist()
    assert len(buffers) == 2
    assert array.tensor.data_ptr() == address


# -- streams


class Tensor:
    def __init__(self):
        self.recorded = []

    def record_stream(self, stream):
        self.recorded.append(stream)


def test_tensors_are_recorded_once_for_each_other_stream(monkeypatch):
    """A plan that is dropped must not give its memory away while another stream still reads it."""
    current = ["first"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[0])
    streams = mirror.Streams(torch.device("cuda", 0))
    tensors = [Tensor(), Tensor()]
    for name in ("first", "second", "second", "first", "third", "second"):
        current[0] = name
        streams.note(lambda: tensors)
    assert [t.recorded for t in tensors] == [["second", "third"]] * 2


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_plan_dropped_while_another_stream_steps():
    """What its tables held is not overwritten before the step has read it."""
    params = parameters(((512, 512),) * 8)
    for p in params:
        p.grad = torch.ones_like(p)
    opt = fusedcalib.SGD(params, lr=1.0)
    opt.step()
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    before = [p.detach().clone() for p in params]
    with torch.cuda.stream(other):
        torch.cuda._sleep(200_000_000)
        opt.step()
    opt._drop_plans()
    gc.collect()
    rubbish = [torch.full((size,), -1, dtype=torch.int64, device="cuda") for size in (32, 64, 256, 4096) * 64]
    torch.cuda.synchronize()
    assert rubbish
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q - 1)
