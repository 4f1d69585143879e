"""What the machine says of itself to a Python that has nothing installed."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path


def output(*command: str) -> str:
    """What a command prints; nothing if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def nvidia(*fields: str) -> list[str] | None:
    """Fields of the first GPU, as nvidia-smi has them; None where nothing tells them."""
    query = f"--query-gpu={','.join(fields)}"
    lines = output("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()
    return [value.strip() for value in lines[0].split(",")] if lines else None


def cpu_name() -> str:
    """The maker's name of the CPU."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.processor() or platform.machine()
