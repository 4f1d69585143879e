"""Faults that other fused optimizers had, one test each; the place is named in its docstring."""

import gc
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from cases import BACKENDS, DEVICE, SHAPES, parameters, state_of, train, twins
from rule_cases import RULES, each, each_few

from fusedcalib.layout.recipe import recipe_of

KERNELS = Path(__file__).parent.parent / "kernels"
cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@each_few
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels' own tests run it at the real size")
def test_offsets_beyond_32_bits(rule, backend, ours, tmp_path):
    """DeepSpeed #7640, apex #1654: rows that lie 2^31 elements apart, in a file full of holes."""
    far = 2**31 + 8
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * far)
    p = torch.nn.Parameter(memory.as_strided((2, 3), (far, 1)))
    (near,) = twins([torch.zeros(2, 3)])
    for optimizer, q in ((ours([p]), p), (ours([near]), near)):
        for i in range(2):
            q.grad = torch.arange(1.0, 7.0).view(2, 3) + i
            optimizer.step()
    torch.testing.assert_close(p.detach().clone(), near.detach())
    assert (near != 0).all()


def sliced(tensor):
    """The same values in every second column of wider memory."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def dense_channels_last(tensor):
    return tensor.clone(memory_format=torch.channels_last)


# name -> shape, how the parameter lies in memory, how its gradient does
LAYOUTS = {
    "transposed parameter": ((5, 7), lambda t: t.t().contiguous().t(), torch.clone),
    "transposed gradient": ((5, 7), torch.clone, lambda t: t.t().contiguous().t()),
    "channels_last parameter": ((4, 3, 5, 2), dense_channels_last, torch.clone),
    "channels_last gradient": ((4, 3, 5, 2), torch.clone, dense_channels_last),
    "channels_last both": ((4, 3, 5, 2), dense_channels_last, dense_channels_last),
    "expanded gradient": ((5, 7), torch.clone, lambda t: t[:, :1].expand(5, 7)),
    "gradient of one number": ((5, 7), torch.clone, lambda t: t[:1, :1].expand(5, 7)),
    "sliced parameter": ((5, 7), sliced, torch.clone),
    "sliced gradient": ((5, 7), torch.clone, sliced),
    "sliced both": ((33,), sliced, sliced),
    "permuted": (
        (3, 4, 5),
        lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.clone,
    ),
    "offset": ((5, 7), lambda t: torch.cat([t, t])[5:], lambda t: torch.cat([t, t])[5:]),
}


@each_few
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_paired_by_index(twin, layout):
    """pytorch #106951, #110758, #126585."""
    shape, lay_param, lay_grad = LAYOUTS[layout]
    values = torch.randn(shape, device=DEVICE)
    built = twin(*([torch.nn.Parameter(lay_param(values))] for _ in "ab"))
    for _ in range(3):
        grad = lay_grad(torch.randn(shape, device=DEVICE))
        built.params[0].grad = grad
        built.expected[0].grad = grad.clone(memory_format=torch.contiguous_format)
        built.ours.step()
        built.theirs.step()
        built.steps += 1
    built.check()


@each_few
def test_sliced_parameter_leaves_its_neighbours(ours):
    memory = torch.randn(6, 8, device=DEVICE)
    kept = memory.clone()
    p = torch.nn.Parameter(memory[1:4, 2:5])
    optimizer = ours([p])
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert (memory[1:4, 2:5] != kept[1:4, 2:5]).all()
    kept[1:4, 2:5] = memory[1:4, 2:5]
    assert torch.equal(memory, kept)


def test_only_empty_tensors(rule, ours):
    """TransformerEngine #3207: a rank whose shards are all empty still steps."""
    params = parameters(((0,), (0, 5), (3, 0)))
    optimizer = ours(params)
    for i in range(1, 3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert not rule.counted or {state_of(optimizer, p)["step"].item() for p in params} == {i}


@each_few
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("centralize", [False, True, "update"])
def test_non_finite_gradients_stay_where_they_are(rule, ours, bad, centralize):
    """One bad element spoils its parameter at most; without centring, only its own element.

    A sign is finite: there the average is spoiled, and the weight it belongs to is not moved by NaN.
    """
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = ours(params, centralize=centralize)
    for p in params:
        p.grad = torch.ones_like(p)
    params[0].grad[2, 3] = bad
    optimizer.step()
    optimizer.step()
    spoiled = ~params[0].isfinite()
    row = torch.zeros_like(spoiled)
    row[2, slice(None) if centralize else 3] = True
    assert not (spoiled & ~row).any()
    kept = params[0] if not rule.signs else optimizer.state[params[0]][rule.moments[0]]
    assert not kept[2, 3].isfinite()
    assert all(p.isfinite().all() for p in params[1:])
    assert all((p != b).all() for p, b in zip(params[1:], before[1:], strict=True) if not centralize)


def test_no_autotune_on_kernels_that_write_in_place():
    """lion-pytorch PR #36: each trial would apply the update once more."""
    sources = list(KERNELS.glob("*.py"))
    assert sources
    assert [s.name for s in sources if "autotune(" in s.read_text()] == []


@cuda
def test_no_host_synchronization_in_a_step(ours):
    """bitsandbytes PR #2050."""
    params = parameters()
    optimizer = ours(params)
    train(optimizer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif("numba" not in BACKENDS, reason="needs numba")
def test_changed_hyperparameters_compile_nothing(rule):
    """dion PR #108: a schedule changes values at each step; a kernel is compiled once a recipe."""
    from numba.core import event

    params = parameters()
    # Of one rule it is seen, of the others that the recipe, by which loops are known, stays as it is.
    backend = "numba" if rule.name == "AdamW" else "eager"
    optimizer = rule.ours(params, backend=backend, **rule.options)
    train(optimizer, 2)
    recipe = recipe_of(rule.ours.rule, optimizer.param_groups[0])
    changes = {"lr": 0.05, "weight_decay": 0.2}
    changes |= {"betas": (0.5, 0.6, 0.7)[: len(rule.options.get("betas", ()))], "eps": 1e-4}
    changes |= {"momentum": 0.5, "alpha": 0.5, "rho": 0.5, "momentum_decay": 1.0, "lr_decay": 0.1}
    with event.install_recorder("numba:compile") as compiled:
        for key in changes.keys() & optimizer.param_groups[0].keys():
            optimizer.param_groups[0][key] = changes[key]
            assert recipe_of(rule.ours.rule, optimizer.param_groups[0]) == recipe
            optimizer.step()
    assert optimizer.backend == backend
    assert len(compiled.buffer) == 0


def memory_in_use(reset=False):
    """(bytes now, most bytes since the last reset) that tensors, or this whole process, take up."""
    if DEVICE == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split()[0]: int(line.split()[1]) << 10 for line in lines if line.endswith("kB")}
    return sizes["VmRSS:"], sizes["VmHWM:"]


@each(["AdamW"])
@pytest.mark.parametrize("centralize", [False, "update"])
def test_a_step_allocates_nothing_of_a_parameters_size(rule, centralize):
    """torchtune, TransformerEngine: the spike comes when memory is fullest."""
    try:
        memory_in_use(reset=True)
    except OSError:
        pytest.skip("needs the peak memory of this process")
    if BACKENDS[0] == "eager":
        pytest.skip("the eager path makes temporaries, as torch.optim's plain loop does")
    p = torch.nn.Parameter(torch.zeros(1024, 8192, device=DEVICE))
    optimizer = rule.ours([p], backend=BACKENDS[0], centralize=centralize, **rule.options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    before, _ = memory_in_use(reset=True)
    for _ in range(2):
        optimizer.step()
    _, peak = memory_in_use()
    assert peak - before < p.nbytes / 4


def test_two_hundred_steps_keep_nothing(backend):
    """pytorch #188174: the host's memory grew by something small each step."""
    params = parameters(SHAPES * 2)
    optimizer = RULES["AdamW"].ours(params, backend=backend, **RULES["AdamW"].options)

    def in_use_after(steps):
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            for p in params[i % 2 :]:  # every time another set of parameters, so a new plan
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.zero_grad()
        sys._clear_type_cache()  # it holds on to attribute names that C code has looked up
        gc.collect()
        return tracemalloc.get_traced_memory()[0], len(gc.get_objects())

    tracemalloc.start()
    try:
        before, after = in_use_after(100), in_use_after(200)
    finally:
        tracemalloc.stop()
    # What is kept a step, a float at the least, is there 200 times: 4,800 bytes, or 200 objects.
    assert after[0] - before[0] < 2400
    assert after[1] - before[1] < 100
