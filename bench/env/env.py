"""Versions, devices and what is missing here, for a report of a bug or to find one.

python -m fusedcalib env [--json]
python3 bench/run.py env

`python3 bench/cli.py env` needs no package at all. Whatever is missing or broken is said, and fails nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bootstrap import installed
from . import problems, system

Facts = dict[str, Any]
PACKAGES = ("torch", "triton", "numba", "llvmlite", "numpy")
DTYPES = ("float32", "float64", "bfloat16", "float16")


def versions() -> Facts:
    """Versions of Python, of fusedcalib and of what it may use; None for what is not installed."""
    import fusedcalib

    return {
        "python": platform.python_version(),
        "fusedcalib": fusedcalib.__version__,
        **{name: installed(name) for name in PACKAGES},
    }


def host() -> Facts:
    """System, interpreter and CPU."""
    return {
        "system": platform.platform(),
        "interpreter": sys.executable,
        "cpu": system.cpu_name(),
        "cores": os.cpu_count(),
    }


def gpus() -> Facts:
    """What torch sees, what it was built for, and what the driver says."""
    told = system.nvidia("name", "driver_version")
    facts: Facts = {"driver": told[1] if told else None, "driver_sees": told[0] if told else None}
    try:
        import torch
    except Exception as error:  # what the driver says is of use without it
        return {**facts, "torch": f"{type(error).__name__}: {error}"}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = [torch.cuda.get_device_properties(index) for index in range(count)]
    seen = [
        {
            "name": one.name,
            "capability": f"{one.major}.{one.minor}",
            "gigabytes": round(one.total_memory / 1e9, 1),
        }
        for one in known
    ]
    return {**facts, "cuda": torch.version.cuda, "hip": torch.version.hip, "torch_sees": seen}


def compiler() -> Facts:
    """What Triton builds its launchers with: found as Triton finds it."""
    asked = os.environ.get("CC")
    found = shutil.which(asked or "gcc") or (None if asked else shutil.which("clang"))
    lines = system.output(found, "--version").splitlines() if found else []
    scheme = sysconfig.get_default_scheme()
    # As Triton: Debian's own scheme has another folder.
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    header = Path(include, "Python.h")
    return {
        "CC": asked,
        "path": found,
        "version": lines[0] if lines else None,
        "Python.h": str(header) if header.exists() else None,
        "looked_in": include,
    }


def backends() -> Facts:
    """What steps parameters on each device and in each dtype, and why."""
    import torch

    from fusedcalib.executors.choose import choose

    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    return {
        device: {name: _chosen(choose, device, getattr(torch, name)) for name in DTYPES} for device in devices
    }


def _chosen(choose: Any, device: str, dtype: Any) -> str:
    import torch

    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    name: str = choose("auto", place, dtype).name
    wanted = "triton" if device == "cuda" else "numba"
    if name == wanted:
        return f"{name}: it is installed, and takes them"
    if installed(wanted) is None:
        return f"{name}: {wanted} is not installed"
    reason = "older than compute capability 8.0" if device == "cuda" else f"no {dtype} on this CPU"
    return f"{name}: {reason}"


def caches() -> Facts:
    """Where compiled kernels are kept."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return {
        "triton": str(folder),
        "triton_writable": os.access(existing, os.W_OK),
        "numba": None,  # compiled anew in every process
    }


def variables() -> Facts:
    """Variables of the environment that change what is compiled or run."""
    first = ("TRITON_", "NUMBA_", "CUDA_VISIBLE", "HIP_VISIBLE", "OMP_NUM_THREADS")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(first)}


PROBES: dict[str, Callable[[], Facts]] = {
    "versions": versions,
    "host": host,
    "gpus": gpus,
    "compiler": compiler,
    "backends": backends,
    "caches": caches,
    "variables": variables,
}


def collect() -> Facts:
    """Everything, whatever is missing: a probe that fails leaves its reason."""
    found: Facts = {name: _guarded(probe) for name, probe in PROBES.items()}
    if "error" in found["versions"]:  # fusedcalib itself cannot be imported: the others are still told
        found["versions"] |= {name: _guarded(installed, name) for name in PACKAGES}
    said = [_guarded(problem, found) for problem in problems.PROBLEMS]
    found["problems"] = [problem for problem in said if problem and "error" not in problem]
    return found


def _guarded(probe: Callable[..., Any], *given: Any) -> Any:
    try:
        return probe(*given)
    except BaseException as error:  # also what a broken library raises, or exits with
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"error": f"{type(error).__name__}: {error}"}


def text(found: Facts) -> str:
    """All that was found, to be read."""
    lines = []
    for name in PROBES:
        lines.append(f"{name}:")
        lines += [f"  {key}: {_value(value)}" for key, value in found[name].items()]
    lines.append("problems:" if found["problems"] else "problems: none found")
    for problem in found["problems"]:
        lines += [f"  {problem['what']}", f"    {problem['mend']}"]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    if isinstance(value, list):
        return "; ".join(map(_value, value)) or "none"
    return "none" if value is None else str(value)


def main(options: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found, indent=1, default=str) if options.json else text(found))
    return 0
