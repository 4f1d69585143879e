"""Few steps on a GPU, for other tools to look at: python3 bench/run.py steps NAME.

`small` holds two steps with everything on, on a tensor of every row class, against plain torch: for
compute-sanitizer. `norm`, `flat`, `8192` and `14336` take one step between cudaProfilerStart and
cudaProfilerStop, when all is compiled and warm: for ncu --profile-from-start off. `trace` writes ten steps
of 1000 tensors as a trace of Chrome: --out trace.json.gz.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ..env import machine
from ..models import shapes
from ..models.architectures import Model, Param
from ..predict import profile_gpu
from ..predict.profile_steps import ProfileCase, everything

WARM, TRACED = 5, 10
# A tensor of every row class, unaligned rows, vectors and a scalar.
SMALL = ((5, 7), (33,), (), (3, 300), (2, 1001), (2, 8192), (2, 20_000), (1, 40_000), (4, 3, 2, 2), (9000,))
EVERYTHING = (
    ProfileCase("AdamW", everything("fp32")),
    ProfileCase("AdamW", everything("bf16"), "bf16+fp32-state"),
)
# name: what is stepped, and tensors of which shapes.
WATCHED: dict[str, tuple[ProfileCase, tuple[tuple[int, ...], ...]]] = {
    "norm": (ProfileCase("AdamW", ("max_grad_norm",), "bf16"), ((4096, 4096),) * 8),
    "flat": (ProfileCase("AdamW"), ((4096, 4096),) * 4),
    "8192": (ProfileCase("AdamW", ("centralize",)), ((8192, 8192),)),
    "14336": (ProfileCase("AdamW", ("centralize",)), ((4096, 14_336),)),
}


def model(name: str, found: tuple[tuple[int, ...], ...]) -> Model:
    """A list of parameters of these shapes."""
    return Model(name, tuple(Param(f"{i}.weight", shape) for i, shape in enumerate(found)))


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Its parameters, and all states of each."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for p in params for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    return [tensor.detach() for tensor in (*params, *states)]


def small(device: torch.device, steps: int = 2) -> list[str]:
    """What is wrong after two steps with everything on, on the GPU's kernels and in plain torch."""
    wrong = []
    for case in EVERYTHING:
        both = []
        for backend in ("triton", "eager"):
            torch.manual_seed(0)
            optimizer = profile_gpu.made(case, model("small", SMALL), device, backend)
            for _ in range(steps):
                optimizer.step()
            both.append(tensors_of(optimizer))
        machine.synchronize(device)
        for ours, plain in zip(*both, strict=True):
            # Sums are added in another order; rounding at random may then fall to the other side.
            allowed = max(1e-5, 2 * torch.finfo(ours.dtype).eps)
            share = float((ours.double() - plain.double()).abs().max() / plain.double().abs().max())
            if not share <= allowed:  # also where it is not a number
                wrong.append(f"{case.title}: a tensor {tuple(ours.shape)} is off by {share:.2g} of its size")
    return wrong


def watched(name: str, device: torch.device) -> None:
    """One step for ncu to look at."""
    case, found = WATCHED[name]
    optimizer = profile_gpu.made(case, model(name, found), device)
    for _ in range(WARM):
        optimizer.step()
    machine.synchronize(device)
    with torch.cuda.profiler.profile():
        optimizer.step()
        machine.synchronize(device)


def trace(path: Path, device: torch.device, backend: str = "triton") -> None:
    """Ten steps of 1000 tensors, to be looked at in chrome://tracing or ui.perfetto.dev."""
    from torch.profiler import ProfilerActivity, profile, record_function

    spec = shapes.get("small-1000")
    optimizer = profile_gpu.made(ProfileCase("AdamW"), model(spec.name, spec.shapes), device, backend)
    for _ in range(WARM):
        optimizer.step()
    machine.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for i in range(TRACED):
            with record_function(f"step {i}"):
                optimizer.step()
        machine.synchronize(device)
    profiler.export_chrome_trace(str(path))


def main(options: argparse.Namespace) -> int:
    device = profile_gpu.here()
    if device is None:
        raise ValueError("torch sees no GPU: these steps are of one")
    if options.name == "small":
        wrong = small(device)
        print("\n".join(wrong) or "two steps with everything on: as plain torch")
        return 1 if wrong else 0
    if options.name == "trace":
        trace(options.out, device)
        print(f"wrote {options.out}")
    else:
        watched(options.name, device)
        print(f"one step: {options.name}")
    return 0
