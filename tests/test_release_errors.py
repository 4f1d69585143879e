"""What gradient release refuses, naming what to do instead, and what exceptions leave: never a wrong step."""

import copy
import sys
import traceback
from contextlib import nullcontext
from itertools import compress
from types import SimpleNamespace

import pytest
import torch
from cases import DEVICE, assert_identical
from release_cases import Run, hooks_of

import fusedcalib
from fusedcalib.engine import part, plan
from fusedcalib.layout.shards import Place

BUCKET = 16_500  # bytes: a matrix of the model, with its bias
NEEDS_ALL = {
    "clipped": ({"max_grad_norm": 1.0}, r"group 0: .* max_grad_norm needs .*; set max_grad_norm=None"),
    "measured": ({"max_grad_norm": float("inf")}, "max_grad_norm needs"),
    "checked": ({"skip_nonfinite": True}, "skip_nonfinite looks at all; set skip_nonfinite=False"),
}


def unchanged(run, before):
    """Parameters and states are as they were, and no hook was left."""
    assert_identical(run.left()[:2], before[:2])


def enable(run, **options):
    return fusedcalib.enable_gradient_release(run.model, run.optimizer, **options)


@pytest.mark.parametrize("case", NEEDS_ALL)
def test_options_that_need_all_gradients(case):
    """At enabling, and where they are switched on later; the group that has them is named."""
    options, said = NEEDS_ALL[case]
    run = Run("AdamW", None, **options)
    before = copy.deepcopy(run.left())
    with pytest.raises(RuntimeError, match=said):
        enable(run)
    assert hooks_of(run) == 0
    late = Run("AdamW", 0)
    late.optimizer.param_groups[1].update(options)
    with pytest.raises(RuntimeError, match=said.replace("group 0", "group 1")):
        late.backward()
    unchanged(late, before)
    with pytest.raises(RuntimeError, match=said.replace("group 0", "group 1")):
        late.optimizer.step()
    unchanged(late, before)


def test_capturable_and_numbers_on_a_device():
    """Without a GPU capturable is refused first by a step; what is asked of the groups is the same."""
    groups = [{"max_grad_norm": 0.0, "skip_nonfinite": False, "capturable": True}]
    asked = SimpleNamespace(needs="others")
    with pytest.raises(RuntimeError, match=r"AdamW: group 0: .* capturable=True .*; set capturable=False"):
        part.check_options("AdamW", groups, asked)
    groups[0]["capturable"] = False
    with pytest.raises(RuntimeError, match="make it a Python number"):
        part.check_options("AdamW", groups, asked)
    run = Run("AdamW", None)
    run.optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(RuntimeError, match="set capturable=False"):
        enable(run)


def test_a_graph_that_captures(monkeypatch):
    """It would replay the numbers of one step."""
    run = Run("AdamW", 0).step()
    before = copy.deepcopy(run.left())
    monkeypatch.setattr(part, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"AdamW: gradient release cannot be captured .* remove\(\) it"):
        run.backward()
    unchanged(run, before)


def test_rows_that_lie_on_several_ranks(monkeypatch):
    """Of the parameters that are centred, or shortened, alone."""
    monkeypatch.setattr(part, "is_spread", lambda p: p.ndim > 1)
    monkeypatch.setattr(part, "place_of", lambda p: Place(0, p.shape[1], across=(0,)))
    said = r"AdamW: parameter 0 \(table.weight\) of group 0: its rows lie on .*; set centralize=False and"
    for options in ({"centralize": True}, {"max_row_norm": 1.0}):
        run = Run("AdamW", None, **options)
        with pytest.raises(RuntimeError, match=said):
            enable(run)
        assert hooks_of(run) == 0
    late = Run("AdamW", 0)
    before = late.model.second.weight.detach().clone()
    late.optimizer.param_groups[0]["centralize"] = True
    with pytest.raises(RuntimeError, match=r"\(second.weight\) of group 0: its rows lie on several ranks"):
        late.backward()
    late.optimizer.param_groups[1]["max_row_norm"] = 1.0  # vectors have no rows
    assert late.model.second.weight not in late.optimizer.state
    assert_identical(late.model.second.weight.detach(), before)


class DistributedDataParallel(torch.nn.Module):
    """By name, as neither needs to be imported to be known; the real ones need ranks."""

    def __init__(self, module):
        super().__init__()
        self.module = module


FullyShardedDataParallel = type("FullyShardedDataParallel", (DistributedDataParallel,), {})


@pytest.mark.parametrize("wrapper", [DistributedDataParallel, FullyShardedDataParallel])
def test_wrappers_that_keep_gradients(wrapper):
    run = Run("AdamW", None)
    inner = torch.nn.Sequential(wrapper(run.model))
    for model in (wrapper(run.model), inner):
        with pytest.raises(RuntimeError, match=rf"{wrapper.__name__}: .*; use FSDP2"):
            fusedcalib.enable_gradient_release(model, run.optimizer)
    assert hooks_of(run) == 0


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_wrapper_that_comes_later(monkeypatch):
    """DDP is seen in the forward pass, before there is a gradient; flat parameters at enabling."""
    run = Run("AdamW", 0)
    wrapped = torch.nn.parallel.DistributedDataParallel
    monkeypatch.setattr(wrapped, "_active_ddp_module", DistributedDataParallel(run.model))
    with pytest.raises(RuntimeError, match="DistributedDataParallel: gradients cannot be released"):
        run.backward()
    assert run.params[0].grad is None
    run.handle.remove()
    run.handle = None
    run.backward()
    monkeypatch.undo()
    run.params[0].ds_id = 1
    with pytest.raises(RuntimeError, match="flat parameters"):
        enable(run)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_gradient_scaler(fused, unscaled):
    """Seen where it steps at the latest; one that is switched off is no scaler."""
    run = Run("AdamW", 1 << 30, fused=fused)
    before = copy.deepcopy(run.left())
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    scaler.scale(run.loss()).backward()
    if unscaled:
        scaler.unscale_(run.optimizer)
    with pytest.raises(RuntimeError, match=r"AdamW: a GradScaler .*; use bf16"):
        scaler.step(run.optimizer)
    unchanged(run, before)
    run.handle.discard()
    off = torch.amp.GradScaler(DEVICE, enabled=False)
    off.scale(run.loss()).backward()
    off.step(run.optimizer)
    assert len(run.optimizer.state) > 0
    run.handle.remove()
    scaler.update()
    scaler.scale(run.loss()).backward()
    scaler.step(run.optimizer)


def test_fp16_autocast_which_needs_a_scaler():
    """In the forward pass, before any parameter was stepped with scaled gradients."""
    run = Run("AdamW", 0)
    with torch.autocast(DEVICE, dtype=torch.float16), pytest.raises(RuntimeError, match="bfloat16"):
        run.loss()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        run.loss().backward()
    run.optimizer.step()
    run.handle.remove()
    with torch.autocast(DEVICE, dtype=torch.float16):
        run.loss()


def test_closures():
    run = Run("AdamW", 0)
    before = copy.deepcopy(run.left())
    called = []
    for arguments, options in (
        ((lambda: called.append(1),), {}),
        ((), {"closure": lambda: called.append(1)}),
    ):
        with pytest.raises(RuntimeError, match=r"AdamW: a closure .* without one"):
            run.optimizer.step(*arguments, **options)
    assert called == []
    unchanged(run, before)
    run.optimizer.step(None)


def test_what_cannot_be_enabled():
    run = Run("AdamW", 0)
    with pytest.raises(RuntimeError, match=r"released already; remove\(\) that handle first"):
        enable(run)
    run.handle.remove()
    with pytest.raises(ValueError, match="Invalid bucket_bytes: -1"):
        enable(run, bucket_bytes=-1)
    with pytest.raises(TypeError, match="SGD is no optimizer of fusedcalib"):
        fusedcalib.enable_gradient_release(run.model, torch.optim.SGD(run.params))
    with pytest.raises(RuntimeError, match="no trainable parameter of Linear is in its param groups"):
        fusedcalib.enable_gradient_release(torch.nn.Linear(2, 2), run.optimizer)
    assert hooks_of(run) == 0
    enable(run)


def test_a_second_backward_pass_in_a_step():
    """Paused or not; a step or discard() between them mends it."""
    run = Run("AdamW", BUCKET)
    for again in (nullcontext, run.handle.paused):
        run.backward()
        before = copy.deepcopy(run.left())
        with again(), pytest.raises(RuntimeError, match=r"second gradient .* call optimizer.step\(\) after"):
            run.loss().backward()
        unchanged(run, before)
        run.handle.discard()
        assert {p.grad for p in run.params} == {None}
    run.backward()
    run.optimizer.step()
    run.step()


def test_averages_are_not_stepped():
    run = Run("AdamW", 0, ema_decay=0.9).step()
    before = copy.deepcopy(run.left())
    with run.optimizer.ema_weights(), pytest.raises(RuntimeError, match=r"step\(\) within ema_weights"):
        run.loss().backward()
    unchanged(run, before)


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
