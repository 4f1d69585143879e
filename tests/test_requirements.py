"""What an interpreter must have: versions, the kind of GPU, which torch and Triton are asked for."""

import ctypes
import os
import re
import sys
from importlib import metadata

import pytest
from packaging.specifiers import SpecifierSet
from runner import ROOT, bootstrap

CPU_TORCH = "torch==2.13.0+cpu"


@pytest.mark.parametrize(
    ("installed", "missing"),
    [
        ({"torch": "2.11.0+cu130", "triton": "3.6.0"}, []),
        ({"torch": "2.13.0.dev20261120+cpu", "triton": "3.10.1"}, []),
        ({"torch": "3.0", "triton-rocm": "3.6.0+rocm7.2"}, []),
        ({"torch": "2.9.1", "triton": "3.6.0"}, ["torch"]),
        ({"torch": "2.11.0", "triton": "3.5.1"}, ["triton"]),
        ({"torch": "2.11.0"}, ["triton"]),
        ({}, ["torch", "triton"]),
    ],
)
def test_lowest_versions(monkeypatch, installed, missing):
    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setitem(bootstrap.CORE, "triton", (3, 6))
    assert bootstrap.missing("torch", "triton") == missing
    assert bootstrap.missing("pytest") == ["pytest"]


def test_requirements_are_those_of_the_package():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + extras["cpu"] + extras["bench"] + extras["test"]
    assert extras["frameworks"] == bootstrap.FRAMEWORKS
    name = re.compile(r"[\w-]+")
    ours = {name.match(wanted)[0] for wanted in bootstrap.requirements("")}
    assert ours | {"triton"} == {name.match(wanted)[0] for wanted in declared}
    lowest = dict(re.findall(r"(\w+)>=([\d.]+)", " ".join(project["dependencies"])))
    for known, version in lowest.items():
        if known in bootstrap.CORE:
            assert ".".join(map(str, bootstrap.CORE[known])) == version


@pytest.mark.parametrize(
    ("present", "libcuda", "kind"),
    [
        ((), False, ""),
        (("/proc/driver/nvidia/version",), True, "nvidia"),
        (("/dev/dxg",), True, "nvidia"),
        (("/proc/driver/nvidia/version",), False, ""),  # a container without the GPU of its host
        ((), True, ""),  # an image for GPUs on a machine without one
        (("/dev/kfd",), False, "amd"),
        (("/dev/kfd", "/dev/nvidiactl"), True, "nvidia"),
    ],
)
def test_gpu_is_what_the_drivers_tell(monkeypatch, present, libcuda, kind):
    def load(library):
        if not libcuda:
            raise OSError(library)
        return object()

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os.path, "exists", lambda path: path in present)
    monkeypatch.setattr(os, "access", lambda path, mode: path in present)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert bootstrap.gpu() == kind
    monkeypatch.setattr(sys, "platform", "win32")
    assert bootstrap.gpu() == ""


# Which torch


def test_the_pin_for_the_cpu_admits_no_other_build(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    wanted, sources = bootstrap.torch_source("")
    admitted = SpecifierSet(wanted.removeprefix("torch"), prereleases=True)
    assert admitted.contains("2.13.0+cpu")
    for build in ("2.13.0", "2.13.0+cu130", "2.13.0+rocm7.2", "2.14.0", "2.14.0+cpu"):
        assert not admitted.contains(build)
    assert sources == [[], ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]]


@pytest.mark.parametrize(
    ("platform", "kind", "triton"),
    [
        ("linux", "", True),
        ("linux", "nvidia", False),
        ("linux", "amd", False),
        ("darwin", "", False),
    ],
)
def test_triton_is_asked_for_where_torch_does_not_bring_it(monkeypatch, platform, kind, triton):
    monkeypatch.setattr(sys, "platform", platform)
    wanted = bootstrap.requirements(kind)
    assert any(name.startswith("triton") for name in wanted) == triton
    assert wanted[0] == (CPU_TORCH if triton else "torch>=2.11")
    if kind == "amd":
        assert bootstrap.torch_source(kind)[1] == [["--index-url", bootstrap.ROCM_INDEX]]
