"""What was measured on: device, versions, commit, date."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..bootstrap import ROOT
from . import system

RESULTS = ROOT / "bench" / "results"


def on_gpu(device: torch.device) -> bool:
    """The one place that decides it, so that the tests can take the GPU's path without a GPU."""
    return device.type == "cuda"


def synchronize(device: torch.device) -> None:
    if on_gpu(device):
        torch.cuda.synchronize(device)


def pick_device(name: str = "auto") -> torch.device:
    """The GPU if there is one, unless another device is asked for."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def describe(device: torch.device) -> dict[str, Any]:
    """The head of every results file."""
    commit, dirty = _commit()
    return {
        "schema": 1,
        "utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit,
        "dirty": dirty,
        "device": _gpu(device),
        "cpu": {"name": system.cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": system.version("triton"),
            "numba": system.version("numba"),
            "cuda": torch.version.cuda,
        },
    }


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device that can still be had; None where the system does not tell."""
    if on_gpu(device):
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s*(\d+) kB", text)
    return 1024 * int(found[1]) if found else None


def short_name(head: dict[str, Any]) -> str:
    """The device in a few words, as titles use it."""
    if head["device"] is not None:
        return str(head["device"]["name"])
    threads = head["cpu"]["threads"]
    return f"{head['cpu']['name']}, {threads} thread{'s' if threads != 1 else ''}"


def slug(head: dict[str, Any]) -> str:
    """The device as part of a file name."""
    name = head["device"]["name"] if head["device"] else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def sensors() -> dict[str, float] | None:
    """Clock in MHz and power in W of the first GPU now; None where nothing tells them."""
    values = system.nvidia("clocks.sm", "power.draw")
    try:
        return {"mhz": float(values[0]), "watt": float(values[1])} if values else None
    except ValueError:  # "[N/A]"
        return None


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if not on_gpu(device):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    driver = system.nvidia("driver_version")
    return {
        "name": torch.cuda.get_device_name(device),
        "sm": f"{major}.{minor}",
        "driver": driver[0] if driver else None,
        "clock_mhz_min_max": None,  # filled in by the suite, from samples during the run
        "power_w": None,
    }


def _commit() -> tuple[str | None, bool | None]:
    """The commit these files are of, and whether they were changed since; None outside of git."""
    commit = system.output("git", "-C", str(ROOT), "rev-parse", "HEAD").strip()
    if not commit:
        return None, None
    return commit, bool(system.output("git", "-C", str(ROOT), "status", "--porcelain", "-uno").strip())
