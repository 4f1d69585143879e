"""What exceptions and interrupts amid gradient release leave: never a wrong step."""

import copy
import sys
import traceback
from itertools import compress

import pytest
import torch
from cases import assert_identical
from release_cases import Run, unchanged

import fusedcalib
from fusedcalib.engine import plan

BUCKET = 16_500  # bytes: a matrix of the model, with its bias


class Failing(torch.autograd.Function):
    """Raises in its backward pass."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


def failed(run, error):
    """A backward pass of which the second layer is stepped, the first has no gradient."""
    hook = run.model.first.register_forward_hook(lambda *args: Failing.apply(args[2], error))
    torch.manual_seed(100 + run.taken)
    with pytest.raises(type(error)):
        run.loss().backward()
    hook.remove()


@pytest.mark.parametrize("error", [ValueError("in a layer"), KeyboardInterrupt()])
def test_an_exception_in_the_backward_pass(error):
    """step() finishes the step of what has a gradient; discard() drops it, and what was stepped stays so."""
    expected = Run("AdamW", None)
    failed(expected, error)
    got = [p for p in expected.params if p.grad is not None]
    assert 0 < len(got) < len(expected.params) - 2
    expected.optimizer.step()
    run = Run("AdamW", BUCKET)
    failed(run, error)
    stepped = [p for p in run.params if p in run.optimizer.state]
    left = [p for p in run.params if p.grad is not None]
    assert stepped
    assert left
    assert len(stepped) + len(left) == len(got)
    run.optimizer.step()
    assert_identical(run.left()[:2], expected.left()[:2])
    other = Run("AdamW", BUCKET)
    failed(other, error)
    kept = copy.deepcopy(other.left())
    other.handle.discard()
    unchanged(other, kept)
    assert {p.grad for p in other.params} == {None}
    for each in (other, run, expected):
        each.step(2)
    assert_identical(run.left()[:2], expected.left()[:2])
    counted = {int(entry["step"]) for entry in other.optimizer.state.values()}
    assert counted == {2, 3}


def test_a_bucket_that_cannot_be_stepped_is_left_as_it_was():
    """A sparse gradient: the others of its bucket wait with it, for discard()."""
    run = Run("SGD", BUCKET)
    run.model.table.sparse = True
    run.model.head.weight = torch.nn.Parameter(run.model.table.weight.detach().clone())  # else it is dense
    with pytest.raises(RuntimeError, match="sparse gradient"):
        run.step(2)
    assert run.model.table.weight.grad is not None
    assert run.model.table.weight not in run.optimizer.state
    run.handle.discard()
    run.model.table.sparse = False
    run.step(2)


@pytest.fixture
def interrupting():
    """`interrupting(n)`: from now on the n-th line of the package that runs raises KeyboardInterrupt."""
    home = fusedcalib.__path__[0]

    def of(count):
        left = [count]

        def trace(frame, event, _):
            if not frame.f_code.co_filename.startswith(home):
                return None
            if event == "line":
                left[0] -= 1
                if left[0] == 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)

    before = sys.gettrace()
    yield of
    sys.settrace(before)


def interrupted(interrupting, line):
    """A training interrupted in its second backward pass; None where that has fewer lines, else whether a
    bucket was being launched.
    """
    run, launched = Run("SGD", BUCKET).step(), None
    interrupting(line)
    try:
        run.backward()
    except KeyboardInterrupt as error:
        frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        launched = (plan.__file__, "step") in [(code.co_filename, code.co_name) for code in frames]
    finally:
        sys.settrace(None)
    return run, launched


@pytest.mark.parametrize("first", [1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 60, 5))])
def test_an_interrupt_at_any_line(interrupting, first):
    """Nothing is stepped twice, and what has a gradient is stepped by step(); then it goes on.

    Only parameters of a bucket that was just being launched, without gradients then, may be as they were.
    """
    before, expected = (Run("SGD", None).step(times).left()[0] for times in (1, 2))
    places = 0
    while True:
        run, launched = interrupted(interrupting, first + 59 * places)
        if launched is None:
            break
        places += 1
        kept = [p.grad is not None for p in run.model.parameters()]
        came = [id(p) in run.handle._seen for p in run.model.parameters()]
        run.optimizer.step()
        assert {p.grad for p in run.params} == {None}
        same = list(map(torch.equal, run.left()[0], expected))
        assert all(compress(same, kept))
        assert all(compress(same, came)) or launched
        others = [(now, then) for now, then, it in zip(run.left()[0], before, same, strict=True) if not it]
        assert all(torch.equal(now, then) for now, then in others)
        run.step(2)
    assert places > 10
