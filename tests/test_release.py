"""Gradient release takes the steps of `backward(); step()`, bit for bit, and leaves no gradient behind."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from cases import DEVICE, FUSED, assert_identical
from release_cases import Run, hooks_of
from rule_cases import RULES, each

import fusedcalib
import fusedcalib.nn

BF16 = torch.bfloat16
STEPS = 5
BUCKET = 16_500  # bytes: a matrix here has 16,384 in fp32, its bias 256
SMALL = {"min_8bit_size": 64}
STAGES = {
    "centred": {"centralize": True},
    "update centred": {"centralize": "update", "max_row_norm": 0.6},
    "noise": {"noise": fusedcalib.GradientNoise(0.1), "seed": 3},
    "noise of weights": {"noise": fusedcalib.WeightNoise(0.01), "ema_decay": 0.9},
    "l1": {"l1": 0.01, "max_row_norm": 0.6, "ema_decay": 0.9},
    "rounded at random": {"stochastic_rounding": True, "dtype": BF16},
    "split16": {"master_weights": "split16", "dtype": BF16},
    "split8, 8bit": {"master_weights": "split8", "state_dtype": "8bit", "dtype": BF16, **SMALL},
    "split8 at random": {"master_weights": "split8", "stochastic_rounding": True, "dtype": BF16},
    "float32, bfloat16": {"master_weights": "float32", "state_dtype": "bfloat16_stochastic", "dtype": BF16},
    "8bit": {"state_dtype": "8bit", "centralize": True, **SMALL},
}


def assert_same(rule, bucket_bytes, **options):
    """The same after every step of a few, and nothing left of gradients that were released."""
    with_release, without = Run(rule, bucket_bytes, **options), Run(rule, None, **options)
    for _ in range(STEPS):
        assert_identical(with_release.step().left(), without.step().left())
        assert {p.grad for p in with_release.params} == {None}
    assert all(p.grad is not None for p in with_release.foreign)
    assert without.params[0].grad is not None
    return with_release


@each(RULES)
def test_every_rule(rule):
    assert_same(rule.name, BUCKET)


@pytest.mark.parametrize("stages", STAGES)
def test_every_stage_and_storage(stages):
    assert_same("AdamW", BUCKET, **STAGES[stages])


@pytest.mark.parametrize("bucket_bytes", [0, 1, 1 << 30])
def test_any_size_of_buckets(bucket_bytes):
    assert_same("AdamW", bucket_bytes, noise=fusedcalib.GradientNoise(0.1))


@pytest.mark.skipif(FUSED is None, reason="needs numba")
def test_by_loops():
    run = assert_same("AdamW", BUCKET, **STAGES["split8, 8bit"], backend=FUSED)
    assert run.optimizer.backend == FUSED


def test_a_bucket_is_stepped_within_the_backward_pass():
    """At once where it is full, and no other parameter."""
    run = Run("AdamW", BUCKET)
    seen = []
    for name, param in run.model.named_parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(
                lambda p, name=name: seen.append((name, p.grad is None, len(run.optimizer.state)))
            )
    run.backward()
    assert [name for name, freed, _ in seen if freed] == ["second.weight", "first.weight"]
    before = {name: stepped for name, _, stepped in seen}
    assert before["second.weight"] == 2  # with its bias
    kept = [name for name, p in run.model.named_parameters() if p.grad is not None]
    assert kept == ["table.weight", "foreign.weight", "foreign.bias"]
    run.optimizer.step()
    assert run.model.table.weight.grad is None


def test_the_last_bucket_is_stepped_with_the_last_gradient():
    """Also where it is not full."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = fusedcalib.SGD(model.parameters(), lr=0.1, momentum=0.9, backend="eager")
    fusedcalib.enable_gradient_release(model, optimizer)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        assert {p.grad for p in model.parameters()} == {None}
        assert len(optimizer.state) == 4
        optimizer.step()


def test_hooks_of_the_optimizer_are_called_once_a_step():
    run, called = Run("SGD", 0), []
    run.optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: called.append("after"))
    run.step(2)
    assert called == ["before", "after"] * 2
    assert run.scheduler.last_epoch == 2


def test_a_gradient_is_not_stepped_while_paused():
    run = Run("AdamW", 0)
    before = copy.deepcopy(run.left())
    with run.handle.paused(), run.handle.paused():
        run.loss().backward()
    with run.handle.paused():
        run.loss().backward()
    assert_identical(run.left()[:2], before[:2])
    assert run.model.first.weight.grad is not None
    run.optimizer.step()
    assert run.model.first.weight.grad is None


def test_removed_it_leaves_nothing_behind():
    run, without = Run("AdamW", None).step(), Run("AdamW", None).step(3)

    def found():
        return hooks_of(run), {*vars(run.optimizer)}, run.optimizer._step_supports_amp_scaling

    before = found()
    assert before[0] == 0
    for _ in range(2):
        with fusedcalib.enable_gradient_release(run.model, run.optimizer, BUCKET) as run.handle:
            assert hooks_of(run) == len(run.params) + 3
            run.step()
        run.handle.remove()
        assert before == found()
    run.handle = None
    assert_identical(run.left(), without.left())
    assert_identical(run.step(2).left(), without.step(2).left())
    assert run.params[0].grad is not None


def test_gradients_left_when_it_is_removed_are_for_the_next_step():
    run, without = Run("AdamW", BUCKET), Run("AdamW", None)
    for each_run in (run, without):
        each_run.backward()
    run.handle.remove()
    assert run.model.table.weight.grad is not None
    for each_run in (run, without):
        each_run.optimizer.step()
    assert_identical(run.left()[:2], without.left()[:2])


def test_copies_and_files_know_no_release(tmp_path):
    run = Run("AdamW", BUCKET)
    run.step()
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    assert optimizer._optimizer_step_pre_hooks == {}
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.float16):  # which is refused of the model itself
        model(tokens).sum().backward()
    assert model.first.weight.grad is not None  # as nothing was stepped
    torch.save(run.model, tmp_path / "model.pt")
    pickle.loads(pickle.dumps(run.optimizer))
    torch.load(tmp_path / "model.pt", weights_only=False)


def test_loading_a_state_dict_goes_on_from_it():
    run, without = Run("AdamW", BUCKET), Run("AdamW", None)
    saved = copy.deepcopy([(r.step(2).model.state_dict(), r.optimizer.state_dict()) for r in (run, without)])
    for each_run, (weights, state) in zip((run, without), saved, strict=True):
        each_run.step(2)
        each_run.model.load_state_dict(weights)
        each_run.optimizer.load_state_dict(state)
    assert_identical(run.step(3).left()[:2], without.step(3).left()[:2])


def test_a_bucket_of_vectors_is_not_taken_for_a_model_without_rows():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run("AdamW", 0, centralize=True).step()


def test_groups_and_parameters_that_join_later():
    """A new one is stepped as always; noise goes by the places that parameters have then."""
    noise = fusedcalib.WeightNoise(0.1)
    runs = Run("SGD", 0, noise=noise), Run("SGD", None, noise=noise)
    for run in runs:
        for group in run.optimizer.param_groups:
            del group["param_names"]
        run.step()
        run.optimizer.param_groups[0]["params"].reverse()
        run.step(2)
        run.optimizer.add_param_group({"params": run.foreign, "lr": 0.1})
        run.step(2)
    assert_identical(runs[0].left()[:2], runs[1].left()[:2])


def test_what_is_no_more_in_a_group_is_refused():
    run = Run("SGD", 0).step()
    run.optimizer.param_groups[0]["params"].pop(0)
    with pytest.raises(RuntimeError, match=r"in no param group any more; remove\(\)"):
        run.step(3)


def test_virtual_layers_scale_rows_in_the_bucket():
    """The factors of rows are multiplied by the step that releases the gradient."""
    found = []
    for release in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        assert fusedcalib.nn.virtualize(model, scale=1.0)
        optimizer = fusedcalib.SGD(model.parameters(), lr=0.1, momentum=0.9, backend="eager")
        fusedcalib.nn.scale_in_step(model, optimizer)
        if release:
            fusedcalib.enable_gradient_release(model, optimizer, 0)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    assert_identical(*found)


def test_nothing_keeps_model_and_optimizer_alive():
    run = Run("AdamW", BUCKET).step(2)
    watched = [weakref.ref(run.model), weakref.ref(run.optimizer), weakref.ref(run.params[0])]
    del run
    gc.collect()
    assert [each() for each in watched] == [None] * 3
