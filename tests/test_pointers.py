"""Tensors read in bulk from memory: whatever changes is seen; where that cannot be, each is asked."""

import copy
import gc
import sys

import numpy
import pytest
import torch

import fusedcalib
from fusedcalib.engine import offsets
from fusedcalib.engine.guards import Guards
from fusedcalib.engine.pointers import DictVersions, Reading

AT = offsets.offsets()
known = pytest.mark.skipif(AT is None, reason="this Python or torch keeps its objects otherwise")
SHAPES = ((4, 3), (5,), (2, 3, 4, 1, 2), (), (0, 3))


def made(shapes=SHAPES):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params, [torch.randn(shape) for shape in shapes]


def read(params, others):
    grads = [p.grad for p in params]
    addresses = [numpy.array([t.data_ptr() for t in ts]) for ts in ([*params, *others], grads)]
    return Reading(params, others, grads, *addresses, AT)


def test_this_process_is_read_in_bulk():
    """In CPython with torch as released; elsewhere the slow way is taken, which is no fault but a loss."""
    assert AT is not None
    assert (offsets.version_offset() is not None) == (sys.version_info < (3, 13))


@known
def test_nothing_has_changed():
    params, others = made()
    reading = read(params, others)
    for _ in range(2):
        assert reading.hold()
        found = reading.gradients().tolist()
        assert [a for a, p in zip(found, params, strict=True) if p.numel()] == [
            p.grad.data_ptr() for p in params if p.numel()
        ]
    params[0].data.add_(1)
    others[1].mul_(2)
    assert reading.hold()


CHANGES = {
    "data": lambda t: setattr(t, "data", t.data.clone()),
    "transposed": lambda t: setattr(t, "data", torch.randn(3, 4).t()),
    "another dtype": lambda t: setattr(t, "data", t.data.double()),
    "set_": lambda t: t.set_(torch.randn_like(t)),
    "resized": lambda t: t.untyped_storage().resize_(1 << 22),
    "another place of its storage": lambda t: t.set_(torch.randn(13).as_strided((4, 3), (3, 1), 1)),
}


@known
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("of_params", [True, False])
def test_what_changes_is_seen(change, of_params):
    params, others = made(((4, 3), (4, 3)))
    reading = read(params, others)
    with torch.no_grad():
        change((params if of_params else others)[1])
    assert not reading.hold()


@known
def test_exchanged_tensors_are_seen_and_not_followed():
    """Python's objects exchange their tensors; the old one is freed."""
    params, others = made(((4, 3), (4, 3)))
    reading = read(params, others)
    torch.utils.swap_tensors(others[0], torch.randn(4, 3))
    gc.collect()
    assert not reading.hold()


@known
def test_a_parameters_own_strides_are_seen():
    """In place, at the same address."""
    params, others = made(((3, 3), (4,)))
    reading = read(params, others)
    params[0].data = params[0].data.t()
    assert not reading.hold()


OTHER_GRADIENTS = {
    "none": lambda p: None,
    "transposed": lambda p: torch.randn(3, 4).t(),
    "lazy": lambda p: torch._neg_view(torch.randn(4, 3)),
    "expanded": lambda p: torch.randn(1, 3).expand(4, 3),
    "sparse": lambda p: torch.randn(4, 3).to_sparse(),
}


@known
@pytest.mark.parametrize("make", OTHER_GRADIENTS.values(), ids=OTHER_GRADIENTS)
def test_another_kind_of_gradient_is_seen(make):
    params, others = made(((4, 3), (4, 3)))
    reading = read(params, others)
    params[1].grad = make(params[1])
    assert reading.hold()
    assert reading.gradients() is None


@known
def test_gradients_of_the_same_kind_are_found_where_they_are():
    params, others = made()
    reading = read(params, others)
    for _ in range(20):
        for p in params:
            p.grad = None
        for p in params:
            p.grad = torch.randn(p.numel() + 3)[3:].view(p.shape) if p.numel() else torch.randn_like(p)
        found = reading.gradients()
        for p, address in zip(params, found.tolist(), strict=True):
            assert p.grad.data_ptr() in (address, 0)


@known
def test_a_gradient_turned_in_place_is_seen():
    params, others = made(((3, 3), (4,)))
    reading = read(params, others)
    params[0].grad.t_()
    assert reading.gradients() is None


@known
def test_gradients_of_autograd_are_found():
    """They have no object of Python's until someone asks."""
    params, others = made(((4, 3), (5,)))
    reading = read(params, others)
    for p in params:
        p.grad = None
    sum(p.square().sum() for p in params).backward()
    found = reading.gradients().tolist()
    assert found == [p.grad.data_ptr() for p in params]


def test_more_dimensions_than_a_tensor_holds_in_itself_are_asked():
    params, others = made(((1, 2, 1, 2, 1, 2), (4,)))
    if AT is not None:
        with pytest.raises(LookupError):
            read(params, others)
    watch = Guards([{"params": params}], {})
    assert watch.hold([{"params": params}], {})


@pytest.mark.parametrize("bulk", [True, False])
def test_both_ways_see_the_same(bulk, monkeypatch):
    """A run of an optimizer with all that users do between steps."""
    if not bulk:
        monkeypatch.setattr("fusedcalib.engine.guards.offsets", lambda: None)
        monkeypatch.setattr("fusedcalib.engine.guards.version_offset", lambda: None)
    torch.manual_seed(0)
    params, _ = made(((4, 3), (5,), (3, 3)))
    opt = fusedcalib.AdamW(params, lr=0.1)  # by loops where there is numba: they step through addresses
    other = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.AdamW(other, lr=0.1)

    def step():
        for p, q in zip(params, other, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        opt.step()
        theirs.step()
        for p, q in zip(params, other, strict=True):
            torch.testing.assert_close(p, q)

    step()
    for change in (
        lambda: setattr(params[0], "grad", torch.randn(3, 4).t()),
        lambda: setattr(params[0], "grad", torch.randn(4, 3)),
        lambda: params[2].grad.copy_(torch.randn(3, 3)),
        lambda: setattr(params[1], "grad", None),
        lambda: setattr(params[1], "grad", torch.randn(5)),
        lambda: [setattr(p, "data", p.data.clone()) for p in params],
        lambda: opt.state[params[0]].update(exp_avg=opt.state[params[0]]["exp_avg"].clone()),
        lambda: setattr(
            opt.state[params[2]]["exp_avg"], "data", opt.state[params[2]]["exp_avg"].data.clone()
        ),
        lambda: setattr(params[0], "grad", torch.randn(4, 3, requires_grad=True)),
        lambda: opt.load_state_dict(copy.deepcopy(theirs.state_dict())),
    ):
        with torch.no_grad():
            change()
        for _ in range(2):
            step()


@pytest.mark.skipif(offsets.version_offset() is None, reason="this Python keeps no versions of dicts")
def test_every_change_of_a_dict_is_seen():
    for change in (
        lambda d: d.update(a=3),
        lambda d: d.__setitem__("b", 4),
        lambda d: d.pop("a"),
        lambda d: d.clear(),
        lambda d: d.setdefault("c", 1),
    ):
        dicts = [{"a": 1, "b": 2}, {"a": 5}]
        versions = DictVersions(dicts, offsets.version_offset())
        assert versions.hold()
        assert dicts[0]["a"] == 1
        assert versions.hold()
        change(dicts[0])
        assert not versions.hold()


def test_gradients_whose_kinds_take_turns_are_asked_in_the_end(monkeypatch):
    """They serve alike, and reading them anew at each step would take longer than asking each."""
    made_for = []
    init = Reading.__init__
    monkeypatch.setattr(Reading, "__init__", lambda self, *args: (made_for.append(1), init(self, *args))[1])
    params, _ = made(((4, 3),))
    opt = fusedcalib.SGD(params, lr=0.1, backend="eager")
    plans = set()
    for step in range(20):
        with torch.inference_mode(step % 2 == 1):
            grad = torch.randn(4, 3)
        params[0].grad = grad
        opt.step()
        plans.add(id(opt._engine.plan))
    assert len(plans) == 1
    assert len(made_for) <= 4
