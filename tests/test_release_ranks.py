"""Gradient release of models that ranks share: FSDP2 has the bits it has without; the rest is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo and forks"
)
RUN = Path(__file__).with_name("release_ranks.py")
LIMIT = 240  # seconds


def told(folder, ranks):
    """What each of so many ranks has found."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RUN), str(folder), str(ranks)]
    subprocess.run(command, env=variables, check=True, timeout=LIMIT)
    found = json.loads((folder / f"{ranks}.json").read_text())
    assert len(found) == ranks
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return told(tmp_path_factory.mktemp("ranks"), 2)


def test_two_ranks_step_as_without(two):
    for found in two:
        assert len(found["differing"]) == 12 + 2
        assert {name: count for name, count in found["differing"].items() if count} == {}


@pytest.mark.slow
def test_four_ranks_step_as_without(tmp_path):
    for found in told(tmp_path, 4):
        assert len(found["differing"]) == 21
        assert {name: count for name, count in found["differing"].items() if count} == {}


def test_models_that_are_refused(two):
    """Every rank says the same, before anything is changed."""
    for found in two:
        words = found["refused"]
        assert "AdamW: parameter 2 of group 0: its rows lie on several ranks" in words["rows"]
        assert "set centralize=False" in words["rows"]
        for name in ("DDP", "DDP later"):
            assert words[name].startswith("DistributedDataParallel: gradients cannot be released")
            assert "use FSDP2" in words[name]
        assert words["FSDP1"].startswith("FullyShardedDataParallel: gradients cannot be released")
