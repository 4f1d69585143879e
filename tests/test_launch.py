"""The way from an optimizer to a compiled kernel, as far as it goes without a GPU: all but the launch itself.

A stand-in driver answers for an H100; Triton's own `warmup` binds the real arguments and compiles for it.
"""

import pytest
import torch
from cases import prepared

import fusedcalib.executors.choose

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fusedcalib.executors.triton import run as gpu
from fusedcalib.kernels import launch

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are launched in earnest"),
    pytest.mark.skipif(gpu.interpreted(), reason="the interpreter compiles nothing"),
]

# Short rows, a vector, whole rows, looped rows, rows in pieces, unaligned rows, strides that disagree.
SHAPES = ((64, 64), (12,), (8, 4096), (8, 20000), (2, 40000), (3, 1001))


class Driver:
    """Just what `JITFunction.warmup` asks of a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel, names):
        self.kernel, self.names = kernel, names

    def __getitem__(self, grid):
        def compile_only(*args, **constants):
            self.names.append(self.kernel.__name__)
            return self.kernel.warmup(*args, grid=grid, **constants)

        return compile_only


@pytest.fixture
def launched(monkeypatch):
    names = []
    monkeypatch.setattr(driver, "_active", Driver())
    for part, kernel in launch.KERNELS.items():
        monkeypatch.setitem(launch.KERNELS, part, Compiled(kernel, names))
    monkeypatch.setattr(gpu, "interpreted", lambda: True)  # tensors on the CPU will do
    fusedcalib.executors.choose.choose.cache_clear()
    yield names
    fusedcalib.executors.choose.choose.cache_clear()


def parameters(dtype):
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    params.append(torch.nn.Parameter(torch.zeros(64, 32, dtype=dtype).t()))
    for p in params:
        p.grad = torch.zeros_like(p)
    return params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_launch_for_each_row_class(launched, dtype):
    optimizer = fusedcalib.AdamW(parameters(dtype), backend="triton", centralize=True)
    assert prepared(optimizer).step() == len(launched) == 8
    assert launched.count("row_sums_kernel") == 1  # rows in pieces take two launches


def test_projected_rows_in_pieces_take_a_launch_after_the_step(launched):
    options = {"l1": 0.1, "weight_decay": 0.1, "max_row_norm": 1.0}
    optimizer = fusedcalib.Lion(parameters(torch.bfloat16), backend="triton", **options)
    assert prepared(optimizer).step() == len(launched) == 8
    (project,) = (i for i, name in enumerate(launched) if name == "project_kernel")
    assert launched[project - 1] == "step_kernel"
    assert "row_sums_kernel" not in launched  # nothing is centred


def test_centred_and_projected_rows_in_pieces_take_three_launches(launched):
    options = {"centralize": "update", "max_row_norm": 1.0}
    optimizer = fusedcalib.Adan(parameters(torch.float32)[4:5], backend="triton", **options)
    assert prepared(optimizer).step() == 3
    assert launched == ["row_sums_kernel", "step_kernel", "project_kernel"]


def test_without_rows_all_dense_tensors_share_a_launch(launched):
    optimizer = fusedcalib.SGD(parameters(torch.float32), backend="triton", momentum=0.9)
    assert prepared(optimizer).step() == 2  # aligned and unaligned
    assert launched == ["step_kernel"] * 2


def test_a_changed_number_compiles_nothing(launched):
    optimizer = fusedcalib.AdamW(parameters(torch.float32)[:1], backend="triton", centralize=True)
    kernel = launch.KERNELS["step"].kernel
    prepared(optimizer).step()
    before = compiled_variants(kernel)
    for options in ({"lr": 0.5}, {"betas": (0.5, 0.6)}, {"eps": 1e-3}, {"weight_decay": 0.3}):
        optimizer.param_groups[0].update(options)
        prepared(optimizer).step()
    assert compiled_variants(kernel) == before > 0


def compiled_variants(kernel):
    return sum(len(cache[0]) for cache in kernel.device_caches.values())
