"""What was measured on: device, versions, commit, date."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..bootstrap import ROOT, installed
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


@dataclass
class Head:
    """What was measured on, at the head of every file: device, versions, commit, date."""

    schema: int
    utc: str
    commit: str | None
    dirty: bool | None
    device: dict[str, Any] | None
    cpu: dict[str, Any]
    versions: dict[str, Any]

    @classmethod
    def of(cls, found: dict[str, Any]) -> Head:
        """The head of a file of any kind."""
        return Head(*(found[one.name] for one in fields(Head)))

    @property
    def short_name(self) -> str:
        """The device in a few words, as titles use it."""
        if self.device is not None:
            return str(self.device["name"])
        threads = self.cpu["threads"]
        return f"{self.cpu['name']}, {threads} thread{'s' if threads != 1 else ''}"

    @property
    def slug(self) -> str:
        """The device as part of a file name."""
        name = self.device["name"] if self.device else "cpu"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    @property
    def file_name(self) -> str:
        """`<utc>-<device>.json`, which sorts by time."""
        return f"{self.utc.replace('-', '').replace(':', '')}-{self.slug}.json"

    @property
    def measured_on(self) -> str:
        """Device, versions and date in one line."""
        names = ("torch", "triton" if self.device else "numba", "python")
        known = ", ".join(f"{name} {self.versions[name]}" for name in names if self.versions[name])
        return f"{self.short_name}; {known}; {self.utc[:10]}"


def describe(device: torch.device) -> Head:
    """The head of a file that is made now."""
    commit, dirty = _commit()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "numba": installed("numba"),
        "cuda": torch.version.cuda,
    }
    cpu = {"name": system.cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Head(1, now, commit, dirty, _gpu(device), cpu, versions)


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
