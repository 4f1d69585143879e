"""Parameters spread over ranks (DTensor) step as in one process. Ranks are processes that speak gloo."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo"
)
RUN = Path(__file__).with_name("distributed_run.py")
LIMIT = 280  # seconds; a rank that waits for another for a minute gives up by itself


def results_of(ranks, folder):
    out = folder / f"{ranks}.json"
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RUN)]
    rest = [str(ranks), str(folder / f"store{ranks}"), str(out)]
    processes = [subprocess.Popen([*command, str(rank), *rest], env=variables) for rank in range(ranks)]
    try:
        codes = [process.wait(LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """`results(ranks)`, found once; four read what two have saved."""
    folder = tmp_path_factory.mktemp("ranks")

    @functools.cache
    def of(ranks):
        if ranks == 4:
            of(2)
        return results_of(ranks, folder)

    return of


FOUR = pytest.param(4, marks=pytest.mark.slow)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, FOUR])
def test_ranks_step_as_one_process(results, ranks):
    """Five steps in fp64: noise is the same, sums are in another order.

    They amplify a rounding of 1e-16 by less than a million: quotients are by eps of 1e-3 at least.
    """
    errors = {name: case["error"] for name, case in results(ranks)["trials"].items()}
    assert {name: error for name, error in errors.items() if not error < 1e-10} == {}
    assert len(errors) >= {2: 46, 4: 45}[ranks]
    exact = {name: error for name, error in errors.items() if "AdamW bits" in name}  # bf16, and no sum
    exact |= {name: error for name, error in errors.items() if "bits" in name}  # states in bytes
    assert set(exact.values()) == {0.0}


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_collectives_of_a_step(results, ranks):
    """One sum over each dimension of the mesh for the norm; for rows that ranks share one before the step and
    one after it, where they are centred and projected; whatever the number of parameters."""
    cases = results(ranks)["trials"]
    assert {name: case for name, case in cases.items() if case["collectives"] != case["expected"]} == {}
    assert {case["expected"] for case in cases.values()} >= {0, 1, 2, 3}


@pytest.mark.parametrize(("ranks", "count"), [(2, 6), pytest.param(4, 11, marks=pytest.mark.slow)])
def test_models_and_their_checkpoints(results, ranks, count):
    """As above, through the wrappers; those that go on have read what two ranks, or four, saved."""
    found = results(ranks)["models"]
    assert {name: error for name, error in found.items() if not error < 1e-10} == {}
    assert len(found) == count


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_statistics_are_those_of_one_process(results, ranks):
    """Each element once, in every layout; sums of fp64 in another order, of less than 1000 numbers."""
    found = results(ranks)["statistics"]
    assert {name: error for name, error in found.items() if not error < 1e-10} == {}
    assert len(found) == (3 if ranks == 2 else 7)


def test_a_gradient_that_is_laid_out_otherwise_than_its_parameter(results):
    """Is laid out anew at every step, which is planned once all the same."""
    case = results(2)["embedded"]
    assert case["error"] < 1e-12
    assert case["plans"] == 1


def test_virtual_layers_average_squares_over_ranks(results):
    """Three steps in fp64: sums in another order, all numbers of about 1."""
    case = results(2)["virtual layers"]
    assert case["moved"] > 1e-4
    assert case["error"] < 1e-12


def test_ranks_agree_to_leave_a_step_out(results):
    """One has a gradient that is not finite: neither moves, and both do at the next step."""
    for told in results(2)["scaler"].values():
        assert told == [[[1.0, 0.5], 1]] * 2


def test_nothing_is_left_behind_in_long_runs(results):
    """Over 150 steps of FSDP2. Memory to half a MB, which is less than an object a step and tensor."""
    left = results(2)["long"]
    assert left["DTensors"] == 0
    assert abs(left["objects"]) < 50
    assert left["pages"] * 4096 < 1 << 19
    assert left["dispatched"] == 0  # a step does nothing by DTensor's operations
