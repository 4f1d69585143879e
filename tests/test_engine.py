"""The engine: how far a reader of a step has to go, and what it takes to add an executor."""

import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from cases import FUSED

import fusedcalib
from fusedcalib import options
from fusedcalib.executors import choose as executors
from fusedcalib.executors.eager import EagerExecutor

ROOT = Path(__file__).resolve().parents[1]
COUNT = """
import sys, torch, fusedcalib
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
optimizer = fusedcalib.AdamW(model.parameters(), lr=1e-3, centralize=True, backend="numba")
homes = [fusedcalib.__path__[0], fusedcalib.__path__[0].removesuffix("fusedcalib") + "kernels"]
entered = []

def note(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(tuple(homes)):
        entered.append(code.co_filename)

for warm in (False, False, True):
    model.zero_grad()
    model(torch.ones(3, 8)).sum().backward()
    sys.setprofile(note if warm else None)
    optimizer.step()
    sys.setprofile(None)
print(len(set(entered)), len(entered), sum(a != b for a, b in zip(entered, entered[1:])))
"""


@pytest.mark.skipif(FUSED != "numba", reason="loops are the CPU's")
def test_a_warm_step_can_be_read_from_top_to_bottom():
    """Files it enters, calls, and how often it goes from one file to another."""
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files, calls, changes = map(int, done.stdout.split())
    assert files <= 11
    assert calls <= 80
    assert changes <= 70


class ToyExecutor(EagerExecutor):
    """Runs buckets as plain torch, and notes what it runs."""

    name = "toy"

    def __init__(self):
        self.stepped = 0

    def step_bucket(self, bucket, part="step"):
        self.stepped += len(bucket.slots)
        return super().step_bucket(bucket, part)


@pytest.fixture
def toy(monkeypatch):
    """The toy among the executors, before all others."""
    module = types.ModuleType("fusedcalib.executors.toy")
    executor = ToyExecutor()
    module.load = lambda: executor
    module.why_not = lambda device, dtype, by_name: (
        None if dtype == torch.float64 else f"is not made for {dtype}"
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(executors, "NAMES", ("toy", *executors.NAMES))
    monkeypatch.setattr(options, "BACKENDS", (*options.BACKENDS, "toy"))
    executors.choose.cache_clear()
    yield executor
    executors.choose.cache_clear()


def test_an_executor_is_a_file_and_a_name(toy):
    """It says what is against it; the rest of the package asks nobody else."""
    params = [torch.nn.Parameter(torch.ones(2, 3, dtype=dtype)) for dtype in (torch.float64, torch.float32)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fusedcalib.AdamW(params, lr=0.5, centralize=True, max_grad_norm=1.0)
    optimizer.step()
    assert toy.stepped == 1
    assert optimizer.backend.split("+")[-1] == "toy"
    assert params[0][0, 0].item() == pytest.approx(0.995)  # the mean is all of the gradient: decay is left
    branch = torch.nn.Parameter(torch.full((2, 3), 0.5, dtype=torch.float64))
    branch.grad = torch.zeros_like(branch)
    fusedcalib.nn.CSGD([branch], branch=True).step()
    with pytest.raises(RuntimeError, match=r"backend='toy' is not made for torch.float32"):
        fusedcalib.SGD(params, backend="toy").step()


PACKAGE = ROOT / "fusedcalib"
OUTSIDE = [p for folder in ("", "engine/", "layout/", "nn/", "rules/") for p in PACKAGE.glob(f"{folder}*.py")]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nobody_asks_an_executor_for_its_name(path):
    """What an executor can do is said by its attributes: another one has to be told nowhere."""
    compared = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)]
    words = {n.value for node in compared for n in ast.walk(node) if isinstance(n, ast.Constant)}
    assert not words & {"triton", "numba", "eager", "cuda"}
