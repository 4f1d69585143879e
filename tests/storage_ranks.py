"""States and weights in bytes over ranks, each beside the same run in one process. Not a test by itself.

python tests/storage_ranks.py FOLDER RANKS...

Each number of ranks in its turn, which may read what those before it have saved; they are forks of one
process, so that PyTorch is imported once.
"""

import datetime
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which loading imports, in every rank
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from storage_flat import flat
from storage_runs import adamw
from storage_spread import OPTIONS, SHARDED, converted, cut, differing, grids, left_out, sharded, train
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import fusedcalib

SAVED = [*OPTIONS][1:]  # the first has nothing that others have not
SHORT = [*OPTIONS][:2]  # on three ranks


class Run:
    """A model and its optimizer; `ranks` 0 is one process. Dicts of options are saved flattened."""

    def __init__(self, ranks: int, **options: Any) -> None:
        torch.manual_seed(1)
        layers = (torch.nn.Linear(100, 20), torch.nn.Linear(200, 3), torch.nn.Conv2d(3, 4, 10))
        self.model = torch.nn.Sequential(*layers).bfloat16()
        if ranks:
            for layer in (*self.model, self.model):
                fully_shard(layer, mesh=init_device_mesh("cpu", (ranks,)))
        self.optimizer = adamw(self.model.named_parameters(), **options)
        self.how = {"flatten_optimizer_state_dict": isinstance(options["state_dtype"], dict)}

    def state(self, **options: Any) -> dict[str, Any]:
        how = states.StateDictOptions(**options)
        return {
            "model": states.get_model_state_dict(self.model, options=how),
            "optim": states.get_optimizer_state_dict(self.model, self.optimizer, options=how),
        }

    def take(self, saved: dict[str, Any], **options: Any) -> None:
        how = states.StateDictOptions(**options)
        states.set_model_state_dict(self.model, saved["model"], options=how)
        states.set_optimizer_state_dict(self.model, self.optimizer, saved["optim"], options=how)

    def save(self, folder: Path) -> None:
        dcp.save(self.state(**self.how), checkpoint_id=str(folder))

    def load(self, folder: Path) -> "Run":
        for p in self.model.parameters():
            torch.nn.init.zeros_(p)
        saved = self.state(**self.how)
        dcp.load(saved, checkpoint_id=str(folder))
        self.take(saved, **self.how)
        return self


def resumed(ranks: int, folder: Path) -> dict[str, list[str]]:
    """Two steps are saved by two ranks; who has read them goes on as one process, and saves them again."""
    found = {}
    for name in SAVED:
        options = OPTIONS[name]
        whole = Run(0, **options)
        train(whole.optimizer, 1, 2)
        first = folder / f"{name} of 2"
        if ranks == 2 and not first.exists():
            run = Run(ranks, **options)
            train(run.optimizer, 1, 2)
            run.save(first)
        runs = {}
        for file in sorted(folder.glob(f"{name} of *")):
            runs[file.name] = Run(ranks, **options).load(file)
        if ranks != 2:
            runs[first.name].save(folder / f"{name} of {ranks}")
        train(whole.optimizer, 3)
        for key, run in runs.items():
            train(run.optimizer, 3)
            found[key] = differing(run.optimizer, whole.optimizer)
    return found


def other_templates(folder: Path) -> dict[str, str]:
    """What DCP says where states are kept otherwise than in the file."""
    found = {}
    file, saved = folder / "split16, 8bit of 2", OPTIONS["split16, 8bit"]
    for name, options in {
        "fp32": {"master_weights": "split16", "state_dtype": "float32"},
        "split8": OPTIONS["split8, 8bit"],
        "float32": {**saved, "master_weights": "float32"},
        "larger": {**saved, "min_8bit_size": 10_000},
    }.items():
        try:
            Run(2, **options).load(file)
            found[name] = "loaded"
        except (RuntimeError, ValueError, dcp.api.CheckpointException) as error:
            found[name] = str(error).strip().splitlines()[-1]
    return found


def gathered(ranks: int, rank: int) -> list[str]:
    """Whole states on one rank, which are those of one process; and spread again from there."""
    options = OPTIONS["split16, 8bit"]
    run, whole, again = Run(ranks, **options), Run(0, **options), Run(ranks, **options)
    for each in (run, whole):
        train(each.optimizer, 1, 2)
    found = []
    saved = run.state(full_state_dict=True, cpu_offload=True)
    if rank == 0:
        expected = whole.state()["optim"]["state"]
        for name, entry in expected.items():
            mine = saved["optim"]["state"][name]
            found += [f"{name}: {k}" for k in entry if not torch.equal(mine[k], entry[k])]
            found += [f"{name}: {k}" for k in entry if mine[k].dtype != entry[k].dtype]
    again.take(saved, full_state_dict=True, broadcast_from_rank0=True)
    for each in (again, whole):
        train(each.optimizer, 3)
    return found + differing(again.optimizer, whole.optimizer)


def found_by(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """What is not as in one process, by what was tried; [] where all is."""
    if ranks == 4:
        return grids()
    found: dict[str, Any] = {f"file: {name}": what for name, what in resumed(ranks, folder).items()}
    if (folder / f"{ranks}.json").exists():
        return found
    adam, lion = fusedcalib.AdamW, fusedcalib.Lion
    wide = ((8, 64 * 2 * ranks), (5, ranks, 8, 8), (4, 63 * ranks + 1))
    for name in SHORT if ranks == 3 else OPTIONS:
        options = OPTIONS[name]
        found[f"rows, {name}"] = sharded(adam, SHARDED, Shard(0), **options)
        found[f"columns, {name}"] = sharded(adam, wide, Shard(1), **options)
    found["rows, Lion"] = sharded(lion, SHARDED, Shard(0), **OPTIONS["split8, 8bit"])
    found["converted"] = converted(Shard(0))
    found["left out"] = left_out(rank)
    found["gathered"] = gathered(ranks, rank)
    cuts = (((9, 200), 1), ((9, 64 * (ranks - 1)), 1), ((4, 3, 10, 10), 2))
    found["cut"] = [cut(ranks, shape, dim) for shape, dim in cuts]
    found["templates"] = other_templates(folder) if ranks == 2 else {}
    return found | (flat() if ranks == 2 else {})


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # gathering here may take its time
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, ranks, rank)
    told: list[Any] = [None] * ranks
    dist.all_gather_object(told, found_by(rank, ranks, folder))
    if rank == 0:
        again = "" if not (folder / f"{ranks}.json").exists() else " again"
        (folder / f"{ranks}{again}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    where = Path(sys.argv[1])
    for count in map(int, sys.argv[2:]):
        (where / "store").unlink(missing_ok=True)
        mp.start_processes(main, (count, where), nprocs=count, start_method="fork")
