"""States and weights in bytes under what surrounds a step: clipping, steps left out, a GradScaler."""

import math

import pytest
import torch
from cases import assert_identical, prepared, snapshot, twins
from kernel_cases import NUMBA, TRITON, device_of
from storage_runs import BYTES, KEPT, adamw, step, weights

LEAVE = {"skip_nonfinite": True}
LOOPS = "split8 at random, 8bit"  # in the loops and kernels: each takes seconds to compile
EAGER = [pytest.param("eager", kind, id=f"eager, {kind}") for kind in KEPT]
KERNELS = [pytest.param("triton", LOOPS, marks=TRITON.marks, id="triton")]
FUSED = [pytest.param("numba", LOOPS, marks=NUMBA.marks, id="numba"), *KERNELS]


def begun(backend):
    """Parameters of every form in plain torch; else of two."""
    return weights() if backend == "eager" else weights(shapes=((20, 100), (9,)))


def on(backend, params):
    return [torch.nn.Parameter(p.detach().to(device_of(backend), copy=True)) for p in params]


def gradients_with(params, value, place):
    """Ordinary ones, but for one element of one parameter."""
    for p in params:
        p.grad = torch.ones_like(p)
    with torch.no_grad():
        params[place].grad.view(-1)[-1] = value


@pytest.mark.parametrize(("backend", "kind"), [*EAGER, *FUSED])
def test_a_step_that_is_left_out_leaves_every_byte(backend, kind):
    """From the first on; then it goes on as if there had been none."""
    start = begun(backend)
    runs = [adamw(on(backend, start), backend=backend, **LEAVE, **KEPT[kind]) for _ in "ab"]
    params = runs[0].param_groups[0]["params"]
    for number, value in enumerate((math.inf, math.nan, -math.inf)):
        before = snapshot(runs[0])
        gradients_with(params, value, (0, 1, -1)[number])
        runs[0].step()
        if number:
            assert_identical(snapshot(runs[0]), before)
        for run in runs:
            step(run, number)
        assert int(runs[0].skipped_steps) == number + 1
    assert_identical(snapshot(runs[0]), snapshot(runs[1]))


@pytest.mark.parametrize(("backend", "kind"), [*EAGER, *KERNELS])
def test_a_scaler_that_the_step_unscales_for(backend, kind):
    """With fused=True: by powers of two nothing is rounded, so bytes are those of a run without it."""
    start, device = begun(backend), device_of(backend)
    runs = [adamw(on(backend, start), backend=backend, fused=True, **KEPT[kind]) for _ in "ab"]
    scaler = torch.amp.GradScaler(device, init_scale=2.0**6, growth_interval=2)
    params, expected = (run.param_groups[0]["params"] for run in runs)
    scales = []
    for number in range(5):
        step(runs[1], number)
        scaler.scale(torch.zeros((), device=device))
        for p, q in zip(params, expected, strict=True):
            p.grad = q.grad * scaler.get_scale()
        scaler.step(runs[0])
        scaler.update()
        if number == 1:
            gradients_with(params, math.inf, 0)
            before = snapshot(runs[0])
            scaler.step(runs[0])
            scaler.update()
            assert_identical(snapshot(runs[0]), before)
        scales.append(scaler.get_scale())
    assert scales == [64.0, 64.0, 64.0, 128.0, 128.0]  # grown and backed off in the second round
    assert_identical(snapshot(runs[0]), snapshot(runs[1]))


@pytest.mark.parametrize("backend", ["eager", TRITON])
def test_clipped_gradients_make_the_bytes_of_shorter_ones(backend):
    """Gradients of ones and minus ones: the norm and each product are exact in fp32."""
    shapes = ((16, 160), (24, 64))  # 2560 + 1536 = 64^2
    start = weights(torch.float32, shapes)
    runs = [adamw(on(backend, start), backend=backend, **BYTES) for _ in "ab"]
    runs[0].param_groups[0]["max_grad_norm"] = 5.0
    factor = torch.tensor(5.0 / (64.0 + 1e-6), dtype=torch.float32).item()
    for _ in range(3):
        for p, q in zip(*(run.param_groups[0]["params"] for run in runs), strict=True):
            p.grad = torch.randn_like(p).sign()
            q.grad = p.grad * factor
        for run in runs:
            run.step()
        assert runs[0].grad_norm.item() == 64.0
    assert_identical(snapshot(runs[0]), snapshot(runs[1]))


@pytest.mark.parametrize("kind", KEPT)
def test_a_limit_that_is_not_reached_changes_no_byte(kind):
    start = weights()
    runs = [adamw(twins(start), max_grad_norm=limit, **KEPT[kind]) for limit in (None, 1e9)]
    for run in runs:
        step(run, 1, 2, 3)
    assert_identical(snapshot(runs[0]), snapshot(runs[1]))


@pytest.mark.parametrize("kind", KEPT)
def test_capturable_needs_a_gpu_and_changes_nothing_without(kind):
    """Nor is anything converted for a step that cannot be."""
    optimizer = adamw(weights(), state_dtype="float32", master_weights="float32")
    step(optimizer, 1)
    before = snapshot(optimizer)
    options = {"master_weights": "none", "state_dtype": "parameter", **KEPT[kind]}
    optimizer.param_groups[0].update(options, capturable=True)
    with pytest.raises(RuntimeError, match="capturable=True needs all parameters on one GPU"):
        step(optimizer, 2)
    assert_identical(snapshot(optimizer), before)
    optimizer.param_groups[0]["capturable"] = False
    step(optimizer, 2)
    assert prepared(optimizer) is not None


@pytest.mark.parametrize("backend", [TRITON])
def test_capturable_steps_keep_the_bytes_of_others(backend):
    """lr and betas whose powers are exact: the device's numbers are the host's."""
    start = weights(torch.bfloat16, ((6, 100), (9,)))
    runs = [
        adamw(
            on(backend, start),
            backend=backend,
            capturable=capturable,
            betas=(0.5, 0.5),
            lr=0.25,
            **KEPT["split8, 8bit"],
        )
        for capturable in (False, True)
    ]
    for run in runs:
        step(run, 1, 2)
    mine, others = (snapshot(run) for run in runs)
    for (p, entry), (q, expected) in zip(mine, others, strict=True):
        assert entry.pop("step").item() == expected.pop("step").item() == 2
        assert_identical((p, entry), (q, expected))
