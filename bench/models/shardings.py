"""How a model lies on many GPUs, as torchtitan lays out Llama: FSDP2, tensor parallel, HSDP.

A mesh has the dimensions replicate, fsdp and tp, in this order; those of size 1 are left out. Tensor parallel
cuts first: the projections into a block (q, k, v, gate, up), embedding and head by rows, those out of it
(o, down) by columns; norms are copied. Then FSDP2 cuts what is left by rows (where both cut rows it is a
`_StridedShard`).
A part is one of `torch.chunk`: the first ones are the largest, the last ones may be empty.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .architectures import Model, Param, Shape

NODE = 8  # GPUs that are joined by fast links
COLWISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
ROWWISE = ("o_proj", "down_proj")
EMBEDDINGS = ("embed_tokens", "wte", "wpe")


@dataclass(frozen=True)
class Sharding:
    """Sizes of the dimensions of the mesh."""

    replicate: int
    fsdp: int
    tp: int

    @property
    def gpus(self) -> int:
        return self.replicate * self.fsdp * self.tp

    @property
    def dims(self) -> tuple[tuple[str, int], ...]:
        """Names and sizes of the dimensions that parameters are spread over."""
        # Without fsdp it is DDP over the replicas, which keeps parameters as they are.
        sizes = {"tp": self.tp} if self.fsdp == 1 else vars(self)
        return tuple((name, size) for name, size in sizes.items() if size > 1)

    @property
    def mesh(self) -> Mesh | None:
        """What parameters are spread over; None where all of each lies on every GPU, as DDP has it."""
        return Mesh(self.dims) if self.dims else None

    def __str__(self) -> str:
        parts = [f"{name} {size}" for name, size in vars(self).items() if size > 1]
        return ", ".join(parts) or "one GPU"


class Mesh(NamedTuple):
    """Stands for a DeviceMesh: names and sizes of its dimensions."""

    dims: tuple[tuple[str, int], ...]

    @property
    def ndim(self) -> int:
        return len(self.dims)


class Shard(NamedTuple):
    """What the first rank has of a parameter: no rank has more."""

    shape: Shape  # of its part; no element may be 0
    whole: Shape  # of all of it
    kind: str  # "weight", "embedding", or "vector", which neither decays nor is centred
    columns_cut: bool  # whether its rows are cut by tensor parallel
    copies: int  # how many ranks have this very part
    offset: int  # elements between the start of the gradients of its FSDP unit and its own

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def sharding_of(gpus: int, fsdp: int | None, tp: int, replicate: int | None) -> Sharding:
    """The layout for so many GPUs; what is not said follows, replicate is 1 if that leaves fsdp open."""
    if fsdp is None:
        shared = tp * (replicate or 1)
        if gpus % shared:
            raise ValueError(f"{gpus} GPUs are no multiple of tp * replicate = {shared}: change one of them")
        return Sharding(replicate or 1, gpus // shared, tp)
    if replicate is None:
        if gpus % (fsdp * tp):
            raise ValueError(f"{gpus} GPUs are no multiple of fsdp * tp = {fsdp * tp}: change one of them")
        replicate = gpus // (fsdp * tp)
    if replicate * fsdp * tp != gpus:
        raise ValueError(
            f"replicate * fsdp * tp = {replicate} * {fsdp} * {tp} = {replicate * fsdp * tp} is not "
            f"{gpus} GPUs: leave one of them out and it follows"
        )
    return Sharding(replicate, fsdp, tp)


def part(size: int, parts: int, index: int = 0) -> int:
    """How long a part of a dimension is, by the rule of torch.chunk: all alike but the last ones."""
    longest = -(-size // parts)
    return max(0, min(longest, size - index * longest))


def cut_by(name: str, ndim: int) -> int | None:
    """The dimension that tensor parallel cuts: 0 by rows, 1 by columns, None where it copies."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    if ndim == 1 and "norm" in module:
        return None
    if ndim == 2 and module in COLWISE:
        return 0
    if ndim == 2 and module in ROWWISE:
        return 1
    raise ValueError(
        f"tp: nothing is known of how tensor parallel cuts {name}; known are *norm, "
        f"{', '.join((*COLWISE, *ROWWISE))}: rename it so, or use tp 1"
    )


def local_shape(param: Param, sharding: Sharding, fsdp_rank: int = 0, tp_rank: int = 0) -> Shape:
    """Shape of what a rank has of a parameter."""
    shape = list(param.shape)
    cut = cut_by(param.name, len(shape)) if sharding.tp > 1 else None
    if cut is not None:
        shape[cut] = part(shape[cut], sharding.tp, tp_rank)
    shape[0] = part(shape[0], sharding.fsdp, fsdp_rank)
    return tuple(shape)


def check(model: Model, sharding: Sharding) -> None:
    """Refuses a model that tensor parallel cannot cut so."""
    if sharding.tp == 1:
        return
    if model.heads is not None and model.heads % sharding.tp:
        raise ValueError(
            f"tp {sharding.tp}: the {model.heads} heads of keys of {model.name} cannot be split so; "
            f"tp must divide {model.heads}"
        )
    for name, shape in model.params:
        cut = cut_by(name, len(shape))
        if cut is not None and shape[cut] < sharding.tp:
            raise ValueError(f"tp {sharding.tp}: {name} has only {shape[cut]} in dimension {cut}; lower tp")


def shards(model: Model, sharding: Sharding) -> Counter[Shard]:
    """What the first rank has, like parts counted together."""
    check(model, sharding)
    found: Counter[Shard] = Counter()
    for unit in _units(model.params):
        offset = 0  # FSDP2 keeps the gradients of a unit side by side, each as long as the longest part
        for param in unit:
            shape = local_shape(param, sharding)
            cut = cut_by(param.name, len(shape)) if sharding.tp > 1 else None
            copied = cut is None and sharding.tp > 1
            copies = math.prod(
                size for name, size in sharding.dims if name == "replicate" or (name == "tp" and copied)
            )
            found[Shard(shape, param.shape, kind_of(param), cut == 1, copies, offset)] += 1
            if sharding.fsdp > 1:  # without, each gradient has memory of its own
                offset += math.prod(shape)
    return found


def kind_of(param: Param) -> str:
    """The kind of a parameter, as fusedcalib.param_groups sorts those of a model."""
    if len(param.shape) < 2:
        return "vector"
    return "embedding" if any(word in param.name.split(".") for word in EMBEDDINGS) else "weight"


def empty_somewhere(model: Model, sharding: Sharding) -> int:
    """How many parameters have a rank without an element of it: the last one of fsdp."""
    last = sharding.fsdp - 1
    return sum(0 in local_shape(param, sharding, last, sharding.tp - 1) for param in model.params)


def _units(params: Sequence[Param]) -> Iterable[list[Param]]:
    """The FSDP units: each numbered layer is one, all else another."""
    units: dict[str, list[Param]] = {}
    for param in params:
        words = param.name.split(".")
        number = next((i for i, word in enumerate(words) if word.isdigit()), None)
        units.setdefault("" if number is None else ".".join(words[: number + 1]), []).append(param)
    return units.values()
