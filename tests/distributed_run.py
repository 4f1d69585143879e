"""One rank of the distributed tests: each case beside the same run in one process. Not a test by itself.

python tests/distributed_run.py RANK RANKS STORE OUT
"""

import datetime
import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

import distributed_models
import torch
import torch.distributed as dist
from rule_cases import RULES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fusedcalib
from fusedcalib import GradientNoise, WeightNoise
from fusedcalib.statistics import NAMES

# Even and uneven rows, fewer rows or columns than ranks, a convolution, vectors, a scalar.
SHAPES = ((8, 8), (5, 7), (1, 6), (3, 1), (4, 3, 2, 2), (9,), (1,), (12, 4))
SPLIT = (
    (8, 8),
    (5, 7),
    (1, 6),
    (4, 3, 2, 2),
)  # ranks share rows of all
STACKS = ((5, 6, 256), (4, 3, 8))
STACKED = {"matrix_dims": (-2, -1), "backend": "eager", "lr": 0.1}
STEPS = 5
LOOPS = importlib.util.find_spec("numba") is not None  # each rank compiles them: two suffice
CHAIN = {"max_grad_norm": 2.0, "noise": GradientNoise(0.1), "ema_decay": 0.9, "seed": 3, "weight_decay": 0.1}
CHAIN["centralize"] = True
ON_FOUR = ("plain", "bits", "update")
ON_COPIES = ("clipped", "bits")  # where ranks have the same, only their norm is of several
EVERY_RULE = {2: ("tp of rows",), 4: ("fsdp x tp of rows",)}
OTHERS = {
    "plain": {},
    "clipped": {"max_grad_norm": 2.0},
    "centred": {"centralize": True},
    "noisy": {"noise": GradientNoise(0.1), "centralize": True},
    "noisy weights": {"noise": WeightNoise(0.01), "max_grad_norm": 2.0},
    "bits": {"noise": GradientNoise(0.1), "ema_decay": 0.9, "stochastic_rounding": True},
    "update": {**CHAIN, "centralize": "update", "max_row_norm": 2.0},
}


def layouts(ranks: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Mesh and placements."""
    line = init_device_mesh("cpu", (ranks,))
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "fsdp": (line, (Shard(0),)),
        "ddp": (line, (Replicate(),)),
        "tp of rows": (line, (Shard(1),)),
    }
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        found["hsdp"] = (square, (Replicate(), Shard(0)))
        found["fsdp x tp of rows"] = (square, (Shard(0), Shard(1)))
        found["fsdp x tp"] = (square, (Shard(0), Shard(0)))
        found["rows over both"] = (square, (Shard(1), Shard(1)))
    return found


def spread(t: torch.Tensor, mesh: Any, placements: tuple[Any, ...]) -> DTensor:
    """Shards of vectors by their only dimension; copies of what has none. Every rank has the whole."""
    own = [p if not p.is_shard() or p.dim < t.ndim else Replicate() for p in placements]
    return distribute_tensor(t, mesh, own, src_data_rank=None)


def trial(
    rule: str, options: dict[str, Any], mesh: Any, placements: tuple[Any, ...], shapes: Any = SHAPES
) -> dict[str, float]:
    """How far parameters, averages and norm lie from those of one process; collectives of a step."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if "stochastic_rounding" in options else torch.float64
    dtype = torch.float32 if "state_dtype" in options else dtype
    start = [torch.randn(shape, dtype=dtype) for shape in shapes]
    whole = [torch.nn.Parameter(t.clone()) for t in start]
    parts = [torch.nn.Parameter(spread(t, mesh, placements)) for t in start]
    runs = [RULES[rule].ours(params, **options) for params in (whole, parts)]
    counted = []
    original = dist.all_reduce
    for _ in range(STEPS):
        gradients = [torch.randn_like(t) for t in start]
        for p, q, g in zip(whole, parts, gradients, strict=True):
            p.grad, q.grad = g, spread(g, mesh, placements)
        runs[0].step()
        calls: list[int] = []
        dist.all_reduce = lambda *a, calls=calls, **k: (calls.append(1), original(*a, **k))[1]
        try:
            runs[1].step()
        finally:
            dist.all_reduce = original
        counted.append(len(calls))
    errors = [(p - q.full_tensor()).abs().max().item() for p, q in zip(whole, parts, strict=True)]
    for p, q in zip(whole, parts, strict=True):
        for name, value in runs[0].state[p].items():
            other = runs[1].state[q][name]
            if name not in ("step", "mu_product"):
                assert isinstance(other, DTensor)
                assert other.placements == q.placements or name in RULES[rule].of_rows
                other = other.full_tensor()
            errors.append((value - other).abs().max().item())
    if "max_grad_norm" in options:
        errors.append(abs(runs[0].grad_norm.item() - runs[1].grad_norm.item()))
    outer = 1 if "matrix_dims" in options else 0  # last dimension over which rows lie
    split = sum(p.is_shard() and p.dim > outer for p in placements)
    stages = bool(options.get("centralize")) + ("max_row_norm" in options)
    expected = mesh.ndim * ("max_grad_norm" in options) + split * stages
    trust = RULES[rule].ours.rule.trust
    if trust and trust.adapts(runs[1].param_groups[0]):  # over what each tensor is divided by
        over = {tuple(i for i, p in enumerate(q.placements) if p.is_shard()) for q in parts}
        expected += sum(map(len, over))
    return {"error": max(errors), "collectives": max(counted), "expected": expected}


def trials(ranks: int) -> dict[str, dict[str, float]]:
    """The whole chain with every rule in some layouts; combinations of stages with one rule."""
    found = {}
    for name, (mesh, placements) in layouts(ranks).items():
        every = [rule for rule in RULES if not RULES[rule].of_rows]
        for rule in every if name in EVERY_RULE[ranks] else ("SGD", "AdamW"):
            options = {**RULES[rule].options, **CHAIN, "backend": "eager"}
            found[f"{rule}, {name}"] = trial(rule, options, mesh, placements)
        for words in ON_COPIES if name == "ddp" else OTHERS if ranks == 2 else ON_FOUR:
            others = OTHERS[words]
            found[f"AdamW {words}, {name}"] = trial(
                "AdamW", {"backend": "eager", "lr": 0.1, **others}, mesh, placements
            )
        if LOOPS and (ranks, name) == (2, "tp of rows"):
            options = {**CHAIN, "max_row_norm": 2.0, "backend": "numba", "lr": 0.1}
            found[f"SGD by loops, {name}"] = trial("SGD", options, mesh, placements, SPLIT)
    return found


def statistics(ranks: int) -> dict[str, float]:
    """How far statistics lie from those of one process, relative to them, in every layout; fp64."""
    found = {}
    for name, (mesh, placements) in layouts(ranks).items():
        torch.manual_seed(0)
        start = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
        whole = [torch.nn.Parameter(t.clone()) for t in start]
        parts = [torch.nn.Parameter(spread(t, mesh, placements)) for t in start]
        runs = [fusedcalib.AdamW(p, lr=0.1, centralize=True, backend="eager") for p in (whole, parts)]
        worst = 0.0
        for opt in runs:
            opt.track(*NAMES)
        for _ in range(2):
            for p, q in zip(whole, parts, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = spread(p.grad, mesh, placements)
            one, many = (opt.step() or opt.statistics() for opt in runs)
            assert [*one] == [*many]
            worst = max(worst, *(abs(v - many[k]).item() / max(1.0, abs(v.item())) for k, v in one.items()))
        found[name] = worst
    return found


def stacks(ranks: int) -> dict[str, dict[str, float]]:
    """Stacks of matrices divided by their first, second and last dimension."""
    line = init_device_mesh("cpu", (ranks,))
    found = {}
    for dim in range(3):
        options = {**STACKED, "centralize": True, "max_row_norm": 2.0}
        if dim != 1:  # of rows that lie a pitch apart
            options["noise"] = GradientNoise(0.1)
        found[f"stacks by {dim}"] = trial("AdamW", options, line, (Shard(dim),), STACKS)
        options = {**STACKED, "state_dtype": "8bit", "min_8bit_size": 0}
        found[f"stacks by {dim}, bits"] = trial("AdamW", options, line, (Shard(dim),), STACKS)
    return found


def of_rows(ranks: int) -> dict[str, dict[str, float]]:
    """A number for each row: here, or the same on all ranks that share the row, which one sum finds."""
    line = init_device_mesh("cpu", (ranks,))
    options = {**RULES["AdamMini"].options, "backend": "eager", "max_grad_norm": 2.0}
    found = {}
    for dim in range(2):
        shapes = [s for s in (*SPLIT, (9,)) if dim < len(s)]
        case = trial("AdamMini", options, line, (Shard(dim),), shapes)
        case["expected"] = 2  # for the norm, and for rows that ranks share: a vector is one
        found[f"AdamMini by {dim}"] = case
    case = trial("AdamMini", {**options, "centralize": True}, line, (Shard(0),), SPLIT)
    found["AdamMini centred"] = case
    return found


def main(rank: int, ranks: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{store}", timeout, ranks, rank)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # gathering here may take its time
    models = distributed_models.runs(ranks, Path(out).parent)
    found = {"trials": trials(ranks), "models": models, "statistics": statistics(ranks)}
    if ranks == 2:
        found["trials"] |= stacks(ranks) | of_rows(ranks)
        found["virtual layers"] = distributed_models.virtual(rank, ranks)
        found["embedded"] = distributed_models.embedded(ranks)
        found["long"] = distributed_models.long(ranks)
        found["scaler"] = distributed_models.scaler(rank)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
