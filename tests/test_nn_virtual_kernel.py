"""The kernel of virtual gradients, against the reference and as the layers use it."""

import copy
import math

import pytest
import torch
from kernel_cases import INTERPRETED, TRITON, device_of
from kernel_compiled import TARGETS
from virtual_cases import backward, made, target_for

from fusedcalib import reference
from fusedcalib.kernels import launch as kernels
from fusedcalib.kernels.virtual import VirtualNumbers, VirtualSpec
from fusedcalib.nn import set_loss_scale
from fusedcalib.nn import virtual as module


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (8, 128), (21, 2, 13, 5), (16, 257)])
def test_kernel(backend, dtype, shape):
    """Two steps and one in which nothing is accumulated, against the reference in float64."""
    device = device_of(backend)
    r = torch.zeros(shape[1:], device=device)
    expected = r.double()
    eps = torch.finfo(dtype).eps
    for update in (True, True, False):
        grad = torch.randn(shape).to(device, dtype)
        scaled = torch.empty_like(grad)
        gain = torch.tensor(8.0, device=device)
        kernels.launch_virtual(grad, scaled, r, gain, 0.3, 0.7, 1e-3, update)
        if update:
            expected = reference.virtual_gradient(8 * grad.double(), expected, 0.3, 0.7, 1e-3)[1]
        torch.testing.assert_close(r.double(), expected, rtol=1e-6, atol=0)
        wanted = grad.double() * 0.3 / (expected + 1e-3).sqrt()
        torch.testing.assert_close(scaled.double(), wanted, rtol=eps + 1e-6, atol=1e-7)


@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_kernel_compiles(target, dtype):
    """For GPUs that need not be there."""
    triton = pytest.importorskip("triton")
    pointers = {"grad": f"*{dtype}", "scaled": f"*{dtype}", "r": "*fp32", "gain": "*fp32"}
    numbers = VirtualNumbers("i32", "i32", *["fp32"] * 4)
    signature = {**pointers, "n": numbers, "SPEC": "constexpr"}
    constants = {"SPEC": VirtualSpec(UPDATE=True)}
    source = triton.compiler.ASTSource(kernels.virtual_kernel, signature, constexprs=constants)
    gpu = triton.backends.compiler.GPUTarget(*TARGETS[target])
    triton.compile(source, target=gpu, options={"num_warps": 4, "enable_fp_fusion": False})


@pytest.mark.parametrize("backend", [TRITON])
def test_kernel_without_a_finite_sum(backend):
    """What is not finite stays out of r; nothing over nothing is nothing; the plain gradient is exact."""
    device = device_of(backend)
    grad = torch.tensor([[math.inf, math.nan, 0.0, 2.0]], device=device)
    r, one = torch.tensor([3.0, 3.0, 0.0, 0.0], device=device), torch.ones((), device=device)
    scaled = torch.empty_like(grad)
    kernels.launch_virtual(grad, scaled, r, one, 1.0, 0.0, 0.0, True)
    assert r.tolist() == [3.0, 3.0, 0.0, 4.0]
    assert scaled[0, 2:].tolist() == [0.0, 1.0]
    plain = torch.randn(9, 300, device=device)
    r, scaled = torch.zeros(300, device=device), torch.empty_like(plain)
    kernels.launch_virtual(plain, scaled, r, one, 1.0, 1.0, 1.0, True)
    assert torch.equal(scaled, plain)
    assert not r.any()


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("name", ["linear, position", "conv"])
def test_layers_use_the_kernel(backend, name, monkeypatch):
    """On a GPU; here it is told that it may. As without it, for a scaled loss too."""
    device = device_of(backend)
    layer, _, x = made(name)
    layer, x = layer.float().to(device), x.float().to(device)
    twin, target = copy.deepcopy(layer), target_for(layer, x)
    launches = []

    def launch(*arguments):
        launches.append(1)
        kernels.launch_virtual(*arguments)

    monkeypatch.setattr(module, "launch_virtual", launch)
    for _ in range(2):
        monkeypatch.setattr(module, "runs_fused", lambda *_: True)
        ours = backward(layer, x, target)
        monkeypatch.setattr(module, "runs_fused", lambda *_: False)
        theirs = backward(twin, x, target)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.r, twin.r, rtol=1e-6, atol=0)
        set_loss_scale(layer, torch.tensor(64.0, device=device))
        set_loss_scale(twin, 64.0)
    assert len(launches) == 2
