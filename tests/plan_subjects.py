"""Models and shardings that plans are tested on, and how torch calls them."""

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from fusedcalib.bench.models import shardings
from fusedcalib.bench.models.architectures import Llama, Model, Param
from fusedcalib.bench.models.shardings import Sharding

ALONE = Sharding(1, 1, 1)
# Rows short and long, sizes that 3 and 8 do not divide.
TINY = Llama(hidden=96, layers=2, heads=8, kv_heads=4, intermediate=160, vocab=101).model("tiny")
LONG = Model("long", tuple(Param(f"{c}.fc.weight", (8, c)) for c in (40, 1000, 5000, 20_000, 40_000)))


def placements_of(param: Param, layout: Sharding):
    """As torchtitan has them: tensor parallel first, then FSDP2 over what is left of the rows."""
    cut = shardings.cut_by(param.name, len(param.shape)) if layout.tp > 1 else None
    fsdp = _StridedShard(0, split_factor=layout.tp) if cut == 0 else Shard(0)
    tp = Replicate() if cut is None else Shard(cut)
    by_name = {"replicate": Replicate(), "fsdp": fsdp, "tp": tp}
    return [by_name[name] for name, _ in layout.mesh.dims]
