"""A model for the tests of profiles, and the engine without kernels."""

import pytest

import fusedcalib.executors.choose
from fusedcalib.bench.models.architectures import Model, Param
from fusedcalib.executors.triton import run as gpu
from fusedcalib.kernels import launch

SMALL = Model(
    "small",
    (
        *(Param(f"{name}.weight", (6, 96)) for name in ("a", "b")),
        *(Param("wte.weight", (16, 96)), Param("long.weight", (2, 40_000)), Param("odd.weight", (4, 63))),
        *(Param("loop.weight", (2, 9000)), Param("a.bias", (96,))),
    ),
)


@pytest.fixture
def launched(monkeypatch):
    """Kernels that the engine launches on the CPU in place of a GPU, with what they are compiled with."""
    names = []

    def kernel(name):
        class Recorded:
            def __getitem__(self, grid):
                return lambda *args, **constants: names.append((name, constants))

        return Recorded()

    for part in launch.KERNELS:
        monkeypatch.setitem(launch.KERNELS, part, kernel(part))
    for part in ("norm", "control"):
        monkeypatch.setattr(launch, f"{part}_kernel", kernel(part))
    monkeypatch.setattr(gpu, "interpreted", lambda: True)
    fusedcalib.executors.choose.choose.cache_clear()
    yield names
    fusedcalib.executors.choose.choose.cache_clear()
