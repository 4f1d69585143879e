"""What can be wrong with an environment, told from what env.py found in it, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import Any

from ..bootstrap import CORE, numbers

Facts = dict[str, Any]
Problem = dict[str, str]


def required(package: str, of: str) -> str:
    """What an installed package says it needs of another, as "<2.6,>=1.22"; "" where it says nothing."""
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    pattern = rf"{of}\s*\(?((?:[<>=!~][^;)]*)?)\)?\s*(?:;|$)"
    found = (re.match(pattern, line) for line in lines if "extra ==" not in line)
    return next((match[1].strip() for match in found if match), "")


def allowed(version: tuple[int, ...], required: str) -> bool:
    """Whether a version lies in "<2.6,>=1.22" or is "==3.6.0"."""
    for sign, bound in re.findall(r"(==|<=|>=|<|>)\s*([\d.]+)", required):
        limit = numbers(bound)
        mine = version[: len(limit)] if sign in ("==", "<=") else version
        fits = {"==": mine == limit, "<=": mine <= limit, ">=": mine >= limit}
        if not (fits | {"<": mine < limit, ">": mine > limit})[sign]:
            return False
    return True


def _problem(what: str, mend: str) -> Problem:
    return {"what": what, "mend": mend}


def on_gpu(found: Facts) -> bool:
    """Whether there is a GPU, as torch or the driver sees it."""
    return bool(found["gpus"].get("torch_sees") or found["gpus"].get("driver_sees"))


def too_old(found: Facts) -> Problem | None:
    """What is always needed is missing or too old."""
    said, wanted = [], []
    for name, least in CORE.items():
        have = found["versions"].get(name)
        least_text = ".".join(map(str, least))
        if name == "triton" and not (have or on_gpu(found)):
            continue  # only a GPU needs it
        if numbers(have) < least:
            said.append(f"{name} {have} is older than {least_text}" if have else f"{name} is missing")
            wanted.append(f"'{name}>={least_text}'")
    return _problem(", ".join(said), f"pip install {' '.join(wanted)}") if said else None


def broken_import(found: Facts) -> Problem | None:
    """fusedcalib cannot be imported at all."""
    error = found["versions"].get("error")
    if error is None:
        return None
    return _problem(f"fusedcalib cannot be imported: {error}", "mend that first: nothing here can step")


def no_compiler(found: Facts) -> Problem | None:
    """Triton compiles a launcher in C for each machine."""
    has = found["compiler"]
    if not on_gpu(found) or has.get("path"):
        return None
    if has.get("CC"):
        return _problem(f"CC is {has['CC']!r}, which is not there", "unset CC, or let it name a C compiler")
    mend = "apt install gcc (or dnf install gcc), or let CC name a C compiler"
    return _problem("Triton finds no C compiler, and cannot launch a kernel without one", mend)


def no_header(found: Facts) -> Problem | None:
    """Triton's launcher includes Python.h."""
    has = found["compiler"]
    if not on_gpu(found) or has.get("Python.h"):
        return None
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    mend = f"apt install {package} (dnf install python3-devel), or use a Python of uv, conda or pyenv"
    return _problem(f"Python.h is not in {has.get('looked_in')}: Triton cannot build its launcher", mend)


def other_triton(found: Facts) -> Problem | None:
    """torch is made for another Triton than the one that is here."""
    have, wants = found["versions"].get("triton"), required("torch", "triton")
    if have is None or allowed(numbers(have), wants):
        return None
    what = f"torch {found['versions'].get('torch')} is made for Triton {wants}, here is {have}"
    return _problem(what, f"pip install 'triton{wants}'")


def newer_numpy(found: Facts) -> Problem | None:
    """numba refuses to be imported under a NumPy that it does not know."""
    have, wants = found["versions"].get("numpy"), required("numba", "numpy")
    if have is None or found["versions"].get("numba") is None or allowed(numbers(have), wants):
        return None
    what = f"numba {found['versions']['numba']} takes NumPy {wants}, here is {have}: CPU steps fail"
    return _problem(what, f"pip install 'numpy{wants}', or a newer numba")


def no_numba(found: Facts) -> Problem | None:
    """Steps on the CPU are plain torch then."""
    if found["versions"].get("numba") is not None:
        return None
    return _problem("numba is not installed: steps on the CPU are plain torch", "pip install numba")


def no_cuda(found: Facts) -> Problem | None:
    """The driver has a GPU that torch does not see."""
    has = found["gpus"]
    if not has.get("driver_sees") or has.get("torch_sees"):
        return None
    if has.get("cuda") is None:
        return _problem(
            f"there is a {has['driver_sees']}, but torch is a build without CUDA",
            "install a CUDA build: https://pytorch.org/get-started/locally",
        )
    return _problem(
        f"there is a {has['driver_sees']}, but torch (CUDA {has['cuda']}) does not see it with driver "
        f"{has.get('driver')}",
        "update the driver, or install torch for an older CUDA; look at CUDA_VISIBLE_DEVICES",
    )


def old_gpu(found: Facts) -> Problem | None:
    """A GPU is older than what fusedcalib/executors/choose.py takes."""
    if found["gpus"].get("hip"):
        return None
    old = [gpu for gpu in found["gpus"].get("torch_sees", []) if numbers(gpu["capability"]) < (8,)]
    if not old:
        return None
    what = f"{old[0]['name']} has compute capability {old[0]['capability']}: steps there are plain torch"
    return _problem(what, "kernels need 8.0 (A100, RTX 30 and newer)")


def locked_cache(found: Facts) -> Problem | None:
    """Triton cannot keep what it compiles."""
    has = found["caches"]
    if has.get("triton_writable", True):
        return None
    return _problem(f"{has['triton']} cannot be written", "set TRITON_CACHE_DIR to a folder that can")


def interpreted(found: Facts) -> Problem | None:
    """A variable of the tests is set, and kernels are interpreted."""
    if found["variables"].get("TRITON_INTERPRET") != "1":
        return None
    return _problem("TRITON_INTERPRET=1: kernels are interpreted, which is for tests", "unset it")


PROBLEMS = (
    *(broken_import, too_old, no_cuda, old_gpu, no_compiler, no_header),
    *(other_triton, newer_numpy, no_numba, locked_cache, interpreted),
)
