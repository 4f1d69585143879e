"""One rank of the tests of the examples: trains as often as asked, in one process. Not a test by itself.

python tests/example_run.py RANK RANKS STORE JOBS

JOBS is JSON, a list of arguments for each training. The last line printed has their exit codes.
"""

import datetime
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "transformer"))

import train


def main(rank: int, ranks: int, store: str, jobs: str) -> None:
    torch.set_num_threads(1)
    if ranks > 1:  # one alone makes its own group, as for a user
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", f"file://{store}", timeout, ranks, rank)
    codes = [train.main(job) for job in json.loads(jobs)]
    print(json.dumps(codes), flush=True)
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
