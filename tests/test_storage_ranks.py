"""States and weights in bytes over ranks that speak gloo, and their checkpoints: the bits of one process."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusedcalib.engine.check_storage import check_storage
from fusedcalib.layout.recipe import recipe_of

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo and forks"
    ),
    pytest.mark.timeout(600),
]
RUN = Path(__file__).with_name("storage_ranks.py")
LIMIT = 280  # seconds
LATER = (5, 2, 4)
FIVE = pytest.param(5, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """`told(ranks)`: what each rank has found. Two and three come first; five, and then two, read theirs."""
    folder = tmp_path_factory.mktemp("ranks")

    @functools.cache
    def run(*counts):
        if counts == LATER:
            run(2, 3)
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(RUN), str(folder), *map(str, counts)]
        subprocess.run(command, env=variables, check=True, timeout=LIMIT)

    def of(ranks):
        run(*((2, 3) if ranks in (2, 3) else LATER))
        return json.loads((folder / f"{ranks}.json").read_text())

    return of


def amiss(found):
    """What is not as in one process, on any rank."""
    others = ("cut", "templates", "flat refused", "flat warned")
    return {name: what for each in found for name, what in each.items() if what and name not in others}


def files(found):
    return sum(name.startswith("file: ") for name in found[0])


@pytest.mark.parametrize("ranks", [2, 3, FIVE])
def test_ranks_keep_what_one_process_keeps(told, ranks):
    """Rows or columns over ranks, uneven, some with nothing; changes between steps, a step that is left out,
    whole state dicts on one rank; flat shards of FSDP1, as rows of their own; and who goes on from what other
    numbers of ranks have saved by DCP."""
    found = told(ranks)
    assert amiss(found) == {}
    assert len(found) == ranks
    assert len(found[0]) == {2: 20, 3: 10, 5: 14}[ranks] + files(found)
    assert files(found) == {2: 3, 3: 3, 5: 6}[ranks]


@pytest.mark.slow
def test_ranks_of_two_dimensions_keep_what_one_process_keeps(told):
    found = told(4)
    assert amiss(found) == {}
    assert len(found[0]) == 4 * 4 + 2


@pytest.mark.slow
def test_back_to_two_ranks(told):
    """From what three and five ranks have saved, of what they had read themselves."""
    found = told("2 again")
    assert amiss(found) == {}
    assert files(found) == 3 * 3


@pytest.mark.parametrize("ranks", [2, 3, FIVE])
def test_blocks_that_ranks_would_share_are_refused(told, ranks):
    """On every rank, before anything is changed: that of rows of 200, that which fewer ranks could split."""
    for found in told(ranks):
        for said, width in zip(found["cut"], (200, 64 * (ranks - 1), 300), strict=True):
            (words,) = said
            assert (
                f"Lion: parameter 1 of group 0: its rows of {width} elements are cut by {ranks} ranks"
                in words
            )
            assert 'state_dtype="float32"' in words
            fits = ranks - 1 if width == 64 * (ranks - 1) else 1
            assert (f"split it over {fits} ranks at most" in words) == (fits > 1)


def test_other_templates_are_refused(told):
    """DCP looks at names and shapes alone: codes cannot be read as states, nor 16 bits as 8."""
    for found in told(2):
        words = found["templates"]
        assert "Missing key in checkpoint state_dict: optim.state.0.weight.exp_avg." in words["fp32"]
        assert "Missing key in checkpoint state_dict: optim.state.0.weight.exp_avg." in words["larger"]
        assert "Missing key in checkpoint state_dict: optim.state.0.weight.master_param" in words["float32"]
        sizes = "saved torch.Size([20, 100, 2]) and current: torch.Size([20, 100])"
        assert f"Size mismatch between {sizes}" in words["split8"]


@pytest.mark.parametrize("form", ["8bit", "8bit of one state", "split16", "split8"])
def test_what_fsdp1_cannot_gather_is_refused(told, form):
    """Whoever asks within torch, on every rank; and fp32 weights, which have no names in flat shards."""
    for found in told(2):
        *gathered, given, taken = found["flat refused"][form]
        assert len(gathered) == 2
        option = "master_weights=" if "split" in form else "state_dtype="
        for words in gathered:
            assert f"AdamW: FSDP1 cannot gather the state of group 0, which has {option}" in words
            assert "optimizer.expanded_state_dict()" in words
        assert given.startswith("master_state_dict: FSDP1 has made flat parts")
        assert taken.startswith("load_master_state_dict: FSDP1 has made flat parts")


def test_flat_shards_beside_a_matrix_are_told_of(told):
    for found in told(2):
        (words,) = found["flat warned"]
        assert "1 parameters of 720 elements are vectors without rows" in words


# Shape, ranks of each dimension of the mesh and what it splits, and the ranks that are said to be fine; None
# where these are. The first are layers of Llama 3, Llama 2 7B, Qwen2 72B and gpt-oss.
CUTS = {
    "14336": ((4096, 14336), [(8, 1)], None),
    "11008 / 8": ((4096, 11008), [(8, 1)], 4),
    "29568 / 8": ((8192, 29568), [(8, 1)], 7),
    "2880 / 2": ((2880, 2880), [(2, 1)], 1),
    "rows": ((2880, 2880), [(7, 0)], None),
    "one rank": ((64, 100), [(1, 1)], None),
    "a shorter last block": ((64, 250), [(2, 0), (3, 1)], 1),
    "the last rank has less": ((64, 190), [(3, 1)], None),
    "the last rank has nothing": ((64, 128), [(3, 1)], 2),
    "rows and columns": ((64, 256), [(2, 0), (2, 1)], None),
    "columns twice": ((64, 256), [(2, 1), (2, 1)], None),
    "columns twice, too often": ((64, 128), [(2, 1), (2, 1)], 2),
    "a shorter part, cut again": ((64, 384), [(2, 1), (2, 1)], 3),
    "channels": ((64, 4, 8, 8), [(4, 1)], None),
    "channels of 9": ((256, 4, 3, 3), [(4, 1)], 1),
    "in the middle of rows": ((64, 4, 64, 8), [(2, 2)], 1),
    "small": ((8, 40), [(2, 1)], None),
}


@pytest.mark.parametrize("case", CUTS)
def test_which_cuts_are_refused(case):
    """By the whole parameter, so that every rank says the same."""
    import fusedcalib

    shape, splits, fits = CUTS[case]
    optimizer = fusedcalib.AdamW([torch.nn.Parameter(torch.empty(1))], state_dtype="8bit")
    sizes, t = [ranks for ranks, _ in splits], torch.empty(shape, dtype=torch.bfloat16, device="meta")
    param = SimpleNamespace(
        shape=t.shape,
        ndim=t.ndim,
        numel=t.numel,
        dtype=t.dtype,
        is_complex=t.is_complex,
        placements=[SimpleNamespace(dim=dim) for _, dim in splits],
        device_mesh=SimpleNamespace(size=lambda i: sizes[i]),
    )
    recipe = recipe_of(optimizer.rule, optimizer.param_groups[0])
    if fits is None:
        check_storage("it", param, recipe)
        return
    with pytest.raises(RuntimeError, match=rf"rows of {t[0].numel()} elements are cut by") as error:
        check_storage("it", param, recipe)
    assert ("ranks at most" in str(error.value)) == (fits > 1)
    assert fits == 1 or f"over {fits} ranks at most" in str(error.value)
