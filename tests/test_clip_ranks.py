"""Clipping over ranks is clipping in one process, where other implementations are known not to be."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo"
)
RUN = Path(__file__).with_name("clip_ranks.py")
RANKS = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
CLOSE = 1e-13  # norms of about 10 in fp64: some hundred terms in another order


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    @functools.cache
    def of(ranks):
        folder = tmp_path_factory.mktemp(f"clip{ranks}")
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, str(RUN), str(folder), str(ranks)], env=variables, check=True, timeout=280
        )
        told = json.loads((folder / f"{ranks}.json").read_text())
        assert len(told) == ranks
        return told

    return of


@RANKS
def test_meshes_in_one_list(results, ranks):
    """FSDP2, HSDP, FSDP2 and TP, copies and plain tensors together: pytorch #133586 and #180346, where torch
    raises, and transformers #46113, a list of DTensors and plain tensors. Plain ones count once."""
    for told in results(ranks):
        assert told["mixed of torch"] == "RuntimeError"  # and ours does not
        for name in ("mixed", "mixed, inf", "mixed, 3"):
            assert told[name]["error"] < CLOSE
            assert told[name]["collectives"] == 3  # of a line, and of both dimensions of a square


@RANKS
def test_collectives_do_not_grow_with_parameters(results, ranks):
    for told in results(ranks):
        for name in ("fsdp, 5", "fsdp, 40", "tp, 5"):
            assert told[name]["error"] < CLOSE
            assert told[name]["collectives"] == 1


@RANKS
def test_experts(results, ranks):
    """Each rank has another expert beside dense parameters: all of them count, once. Megatron-LM #5916 left
    those of other ranks out; DeepSpeed #8478 took the mean of ranks' norms."""
    for name in ("experts, group", "experts, mesh"):
        norms = [told[name]["norm"] for told in results(ranks)]
        assert len({*norms}) == 1
        assert max(told[name]["error"] for told in results(ranks)) < CLOSE
    of_ranks = {told["experts by torch"] for told in results(ranks)}
    assert len(of_ranks) == ranks  # every rank would clip by another norm
    mean = sum(of_ranks) / ranks
    assert norms[0] - max(*of_ranks, mean) > 0.1


@RANKS
def test_pipeline_stages(results, ranks):
    for told in results(ranks):
        assert told["stages"]["error"] < CLOSE
        assert told["stages"]["collectives"] == 1


@RANKS
@pytest.mark.parametrize("case", ["missing", "unused", "partial"])
def test_gradients_that_are_missing_or_not_yet_added_up(results, ranks, case):
    """An expert that only some ranks have used: others take part all the same, or all would wait."""
    for told in results(ranks):
        assert told[case]["error"] < CLOSE


@RANKS
def test_one_rank_has_a_nan(results, ranks):
    """All of them raise, name the same parameter, and have changed nothing. The largest of several numbers,
    one of them NaN, is left to the backend; the norm is NaN on all ranks."""
    for told in results(ranks):
        assert "see the gradients of b. Nothing was changed" in told["raised"]
        assert told["kept"]
        assert told["named"] == ["b"]
        assert told["nan, inf-norm"]


@RANKS
def test_limits_of_each_tensor(results, ranks):
    for told in results(ranks):
        assert math.isfinite(told["adagc"])
        assert told["adagc"] < CLOSE
