"""The steps that other tools look at on a GPU, as far as they go without one."""

import gzip
import json

import pytest
import torch
from kernel_cases import TRITON

from fusedcalib.bench import cli
from fusedcalib.bench.models import shapes
from fusedcalib.bench.predict import profile_gpu
from fusedcalib.bench.repository import gpu_steps

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", [TRITON])
def test_kernels_step_as_plain_torch_with_everything_on(backend, monkeypatch):
    monkeypatch.setattr(gpu_steps, "SMALL", ((5, 7), (33,), ()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert gpu_steps.small(device) == []


def test_a_wrong_step_is_seen(monkeypatch):
    """Where one of both has other gradients in one row."""
    monkeypatch.setattr(gpu_steps, "SMALL", ((5, 7), (33,)))
    made = profile_gpu.made

    def wrong(case, model, device, backend):
        optimizer = made(case, model, device, "eager")
        optimizer.param_groups[0]["params"][0].grad[0] *= 1.01 if backend == "triton" else 1
        return optimizer

    monkeypatch.setattr(profile_gpu, "made", wrong)
    found = gpu_steps.small(CPU)
    for case in gpu_steps.EVERYTHING:
        assert any(line.startswith(f"{case.title}: a tensor (5, 7) is off by") for line in found)


@pytest.mark.filterwarnings("ignore")  # the profiler says that there is no GPU
def test_the_trace_has_every_step(monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "get", lambda name: shapes.ParamList(name, ((4, 4),) * 3))
    path = tmp_path / "trace.json.gz"
    gpu_steps.trace(path, CPU, "eager")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {f"step {i}" for i in range(gpu_steps.TRACED)} <= {event.get("name") for event in events}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert cli.main(["steps", "norm"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
