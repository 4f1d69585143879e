"""Slots -> launches: address tables and lists of tiles, as kernels/table.py reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .geometry import Geometry
from .recipe import Recipe
from .scalars import Scalars
from .shards import Place, local_of
from .stacks import rows_first

Array = np.ndarray[Any, np.dtype[Any]]


class Slot(NamedTuple):
    """One parameter to step, its local states. It does not hold the gradient: `zero_grad` must free it.

    `states` are what the rule's states are kept in and, last, what the parameter has beside it.
    """

    param: Tensor
    states: tuple[Tensor, ...]
    group: int
    recipe: Recipe
    executor: Executor
    words: tuple[int, int, int] = (0, 0, 0)  # stream and key of its noise
    place: Place | None = None  # where its local part lies, if it is spread over ranks
    factors: Tensor | None = None  # [rows], by which its gradient's rows are multiplied first
    scales: tuple[Tensor, ...] = ()  # of the states in bytes
    leading: int = 1  # dimensions that a row is an index of, see layout/stacks.py
    row_state: Tensor | None = None  # [rows], what the rule keeps of each row

    def compiled(self) -> Recipe:
        """What is compiled of its recipe; the same on every rank."""
        return self.recipe.for_tensor(self.param)

    def beside(self) -> tuple[Tensor, ...]:
        """All that the kernels read and write of it besides parameter and gradient."""
        of_rows = () if self.row_state is None else (self.row_state,)
        return (*self.states, *self.scales, *of_rows)

    def tensors(self) -> tuple[Tensor, ...]:
        """Parameter, gradient, state..., what the parameter has beside it: all of one shape.

        Complex ones are pairs of reals, as torch.optim's rules see them. Rows are indices of dimension 0.
        """
        assert self.param.grad is not None
        param, grad = (local_of(t).detach() for t in (self.param, self.param.grad))
        tensors = (param, grad.resolve_conj().resolve_neg(), *self.states)  # copies only where it is lazy
        if self.param.is_complex():
            return tuple(torch.view_as_real(t) for t in tensors)
        if self.leading != 1:
            return tuple(rows_first(t, self.leading) for t in tensors)
        return tensors


class TileShape(NamedTuple):
    """Tile of a slot [rows, columns] and the row class it puts the slot in."""

    rows: int
    columns: int
    row_class: object


class Executor(Protocol):
    """Runs buckets where they lie. Another one is a file in executors/, and a name in executors/choose.py.

    Attributes:
        name: by which `backend` asks for it.
        decider: makes what decides a step on its device; None where only the host can. See engine/decide.py.
        launches: whether the kernels of kernels/ can be launched where it runs.
        branches: steps branch weights, as `layout.branches.BranchExecutor` says.
    """

    name: str
    launches: bool

    @property
    def decider(self) -> Callable[[Any, Scalars, Sequence[Bucket]], Any] | None: ...

    @property
    def branches(self) -> Any: ...

    def shape(
        self, layout: Geometry, by_rows: bool, tensors: int, split: bool, whole: bool = False
    ) -> TileShape:
        """The tile for a slot of this layout and so many tensors.

        `split` if ranks share its rows, `whole` if a row is to be one program's.
        """

    def prepare(self, buckets: list[Bucket]) -> None:
        """Makes those of a plan ready to run: whatever can fail, as memory and compiling, is done here."""

    def step_bucket(self, bucket: Bucket, part: str = "step") -> int:
        """Steps every slot of the bucket; returns the number of kernel launches.

        Where rows lie on several ranks in three parts: "sums" leaves what of a row's mean is known here,
        "step" that of its norm, "finish" shortens it. Where a rule wants norms of whole tensors, "squares"
        comes before "step" and leaves them in `bucket.norms`. After
        all of it "statistics" leaves `bucket.statistics`, where the step is measured. What is left is added
        up in between.
        """

    def squares(self, bucket: Bucket) -> float:
        """Sum of the squares of all gradients of the bucket."""


class Key(NamedTuple):
    """What one launch has in common."""

    executor: Executor
    device: torch.device
    recipe: Recipe
    dtypes: tuple[torch.dtype, ...]
    inner: int
    quads: bool
    aligned: bool
    row_class: object
    mesh: object  # the ranks that share its parameters, if they are spread
    copies: int  # how many of them have the same part
    split: bool  # its rows lie on several ranks
    factored: bool  # its rows have factors


GEOMETRY = 12  # columns of the table between addresses and strides: see kernels/table.py


@dataclass(eq=False)
class Bucket:
    """The slots of one launch, as tables."""

    key: Key
    slots: list[Slot]
    indices: Array  # of its slots in the plan
    table: Array  # int64 [slots, fields]
    tiles: Array  # int32 [programs, 3]
    shared: Scalars = field(default_factory=Scalars)  # one for all buckets of a plan
    capturable: bool = False
    totals: list[Tensor | None] = field(default_factory=list)  # of the rows of each slot, if it is split
    norms: list[Tensor] = field(
        default_factory=list
    )  # of each slot fp64 [sums + 1], where its rule wants such
    statistics: list[Tensor] = field(default_factory=list)  # of each fp64 [OBSERVED], if measured
    table_version: int = 0  # counts changes but those of gradients, for executors that keep a copy
    moves: int = 0  # counts changes of gradients
    cache: dict[Any, Any] = field(default_factory=dict)  # the executor's own: kernels, device copies
    alignable: Array = field(default_factory=lambda: np.zeros(0, dtype=bool))  # of each slot, see Laid
    _only: tuple[int, int | None] | None = None

    @property
    def compute(self) -> torch.dtype:
        """Arithmetic is in fp32, in fp64 for fp64 parameters."""
        return torch.float64 if self.key.dtypes[0] == torch.float64 else torch.float32

    @property
    def scalar_rows(self) -> Array:
        """View of the table: the row of scalars of each slot."""
        return self.table[:, len(self.key.dtypes) + 2]

    @property
    def scalars(self) -> Array:
        """The rows of scalars, in the type of the arithmetic."""
        return self.shared.of(self.compute)

    def set_rows(self, rows: Array) -> None:
        """Takes over which row of scalars each slot of the plan uses."""
        mine = rows[self.indices]
        if not np.array_equal(mine, self.scalar_rows):
            self.scalar_rows[:] = mine
            self.table_version += 1

    def only_row(self) -> int | None:
        """The row of scalars that all its slots use, if it is one."""
        if self._only is None or self._only[0] != self.table_version:
            rows = self.scalar_rows
            self._only = self.table_version, int(rows[0]) if (rows == rows[0]).all() else None
        return self._only[1]

    @property
    def gradients(self) -> Array:
        """View of the table: the addresses of the gradients."""
        return self.table[:, 1]

    def set_gradients(self, addresses: Array) -> None:
        """Takes over the addresses of the gradients of the plan."""
        self.table[:, 1] = addresses[self.indices]
        self.moves += 1


def prepare(buckets: Sequence[Bucket]) -> None:
    """Makes all ready to run, so that nothing fails once the first is launched."""
    of_executors: dict[Executor, list[Bucket]] = {}
    for bucket in buckets:
        of_executors.setdefault(bucket.key.executor, []).append(bucket)
    for executor, members in of_executors.items():
        executor.prepare(members)
