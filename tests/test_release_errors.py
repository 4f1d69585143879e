"""What gradient release refuses, naming what to do instead: never a wrong step."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from cases import DEVICE, assert_identical
from release_cases import Run, hooks_of, unchanged

import fusedcalib
from fusedcalib.engine import part
from fusedcalib.layout.recipe import Needs
from fusedcalib.layout.shards import Place

BUCKET = 16_500  # bytes: a matrix of the model, with its bias
NEEDS_ALL = {
    "clipped": ({"max_grad_norm": 1.0}, r"group 0: .* max_grad_norm needs .*; set max_grad_norm=None"),
    "measured": ({"max_grad_norm": float("inf")}, "max_grad_norm needs"),
    "checked": ({"skip_nonfinite": True}, "skip_nonfinite looks at all; set skip_nonfinite=False"),
}


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
    asked = SimpleNamespace(needs=Needs(remote=True))
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
    monkeypatch.setattr(part, "place_of", lambda p, leading: Place(0, p.shape[1], across=(0,)))
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


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened", "ds_id"])
def test_flat_parameters_without_their_wrapper(mark):
    """As FSDP1 marks them, which are of no class of their own, and DeepSpeed."""
    run = Run("AdamW", None)
    setattr(run.params[0], mark, True)
    with pytest.raises(RuntimeError, match="flat parameters, of FSDP1 or DeepSpeed, cannot be released"):
        enable(run)
    assert hooks_of(run) == 0


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
