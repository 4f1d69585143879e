"""The only launches, and the shapes they have."""

from typing import Any, NamedTuple

from .control import BYTES, GRID, control_kernel, norm_kernel, tiles_at_once
from .direct import Launch
from .language import AVAILABLE, tl
from .rows import project_kernel, row_sums_kernel
from .stages import Flags
from .step import step_kernel

# (longest row, rows of a tile, columns of a tile, warps, how its rows are added up): sixteen elements a
# thread. Few classes keep launches and compiled variants few. Up to 8192 columns a row stays in registers
# without spilling; up to 32768 the gradients of all rows in flight stay in an L2 cache of 50 MB.
ROW_CLASSES = (
    (64, 64, 64, 8, "tile"),
    (256, 16, 256, 8, "tile"),
    (1024, 4, 1024, 8, "tile"),
    (4096, 1, 4096, 8, "tile"),
    (8192, 1, 8192, 16, "tile"),
    (32768, 1, 4096, 8, "loop"),
)
FLAT = (1, 4096, 8)
HELD = 5 * 8192  # elements, of all tensors of a slot, that a program can hold in registers
# From so many tensors on, sixteen elements a thread leave a processor registers for one program, eight for
# two or three: while one waits for the memory or for the sum of its row, another works.
MANY = 6
# Unaligned, an element has an address of its own: fewer elements a thread, and longer rows by a loop.
UNALIGNED_WARPS = 16
UNALIGNED_LOOP = (1, 1024, 4)
# (longest row, columns of a tile, warps): of rows that lie on several ranks, a program walks what is here.
RANKED = ((1024, 1024, 4), (1 << 62, 4096, 8))
LOOPS = ("loop", "ranks")


class Tile(NamedTuple):
    """Shape of a program's tile [rows, columns], the warps that work on it, how rows are added up."""

    rows: int
    columns: int
    warps: int
    reduction: str  # "none" | "tile" | "loop" | "pieces" | "ranks"


class Spec(NamedTuple):
    """What is compiled: one specialisation of the kernel each. No hyperparameter is in it."""

    rule: object  # device function
    flags: Flags
    dtypes: tuple[Any, ...]  # triton dtypes of parameter, gradient, state...
    compute: object
    fields: int
    scalars: int  # in a row; 0 where the one row is an argument of its own
    inner: int
    quads: bool
    vector: int
    tile: Tile
    factored: bool = False  # rows of the gradient have factors

    @property
    def built(self) -> Tile:
        """The tile as it is compiled; the list of tiles is the same, for a loop also has one a row."""
        if self.vector > 1:
            return self.tile
        if self.tile.reduction in LOOPS or self.tile.columns > 4096:
            return Tile(*UNALIGNED_LOOP, "ranks" if self.tile.reduction == "ranks" else "loop")
        return self.tile if self.inner else self.tile._replace(warps=UNALIGNED_WARPS)

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels, by name."""
        return {
            "RULE": self.rule,
            "FLAGS": self.flags,
            "DTYPES": self.dtypes,
            "COMPUTE": self.compute,
            "FIELDS": self.fields,
            "COUNT": self.scalars,
            "D": self.inner,
            "QUADS": self.quads,
            "VECTOR": self.vector,
            "FACTORED": self.factored,
            "R": self.built.rows,
            "C": self.built.columns,
            "REDUCTION": self.built.reduction,
        }


# Without contraction to fused multiply-add every executor rounds alike; the kernel is bound by memory.
OPTIONS = {"enable_fp_fusion": False}
# Programs of few warps: all of them are at work at once, and so the last tiles are the last to be read.
NORM_WARPS = 4
# norm_kernel reads, and wants many programs at once: 64 registers are enough for that. `decide`, which takes
# four times as many, spills then; it is done once, by one program. AMD's compiler knows no such limit.
NORM_OPTIONS: dict[str, dict[str, Any]] = {
    "cuda": {**OPTIONS, "maxnreg": 64},
    "hip": OPTIONS,
    "interpreter": OPTIONS,
}


def tile_for(rows: int, columns: int, by_rows: bool, tensors: int, split: bool = False) -> Tile:
    """The tile for a slot of so many tensors.

    A plain function, never a search: an autotuned in-place step would be taken several times. Rows matter
    where they are added up (by_rows), and where strides keep them apart (rows > 1). `split` where several
    ranks share each.
    """
    if split:
        wide, warps = next((wide, warps) for longest, wide, warps in RANKED if columns <= longest)
        return Tile(1, wide, warps, "ranks")
    for longest, tall, wide, warps, reduction in ROW_CLASSES:
        fits = columns <= longest and (reduction != "tile" or tall * wide * tensors <= HELD)
        if fits and (by_rows or (rows > 1 and reduction == "tile")):
            return _lighter(Tile(tall, wide, warps, reduction if by_rows else "none"), tensors)
    return _lighter(Tile(*FLAT, "pieces" if by_rows else "none"), tensors)


def _lighter(tile: Tile, tensors: int) -> Tile:
    """Half of the tile where there are many tensors; a whole row cannot be halved."""
    if tensors < MANY or (tile.rows == 1 and tile.reduction == "tile"):
        return tile
    if tile.rows > 1:
        return tile._replace(rows=tile.rows // 2)
    return tile._replace(columns=tile.columns // 2)


def dtype_of(name: str):
    """Triton's dtype for a torch dtype's name ("float32", "bfloat16", ...)."""
    return getattr(tl, name)


def parts_of(tile: Tile, flags: Flags) -> tuple[str, ...]:
    """The launches of a step: "sums" that have to be known before it, "finish" where a norm has to be."""
    whole = tile.reduction not in ("pieces", "ranks")
    return tuple(part for part in KERNELS if part == "step" or (not whole and flags.needs(part)))


KERNELS = {"sums": row_sums_kernel, "step": step_kernel, "finish": project_kernel}


def step_launches(table, grads, tiles, scalars, sums, spec: Spec) -> dict[str, Launch]:
    """The launches that step every tile of a list, by their parts and in their order.

    Args:
        table: int64 [slots, fields] on the device.
        grads: int64 [slots] on the device, the addresses of the gradients.
        tiles: int32 [programs, 3] on the device.
        scalars: compute dtype [rows, count] on the device, as kernels/stages.py reads them; or the numbers of
            the one row, where `spec.scalars` is 0.
        sums: compute dtype [2, programs], scratch, where rows are added up from pieces; else anything.
    """
    constants = {**spec.constants(), "num_warps": spec.built.warps, **OPTIONS}
    args = (table, grads, tiles, scalars, sums)
    parts = parts_of(spec.tile, spec.flags)
    return {part: Launch(KERNELS[part], tiles.shape[0], args, constants) for part in parts}


def programs_for(tiles: int) -> int:
    """Programs of a launch of norm_kernel over so many tiles."""
    return min(tiles, GRID)


class Decision(NamedTuple):
    """What is compiled of kernels/control.py: a tape (scalars.py), and whether the norm is looked at."""

    code: tuple[int, ...]
    outputs: tuple[int, ...]
    leaves: int
    check: bool

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels, by name."""
        return {"CODE": self.code, "OUTPUTS": self.outputs, "LEAVES": self.leaves, "CHECK": self.check}


_NORM_ARGUMENTS = ("DTYPES", "COMPUTE", "FIELDS", "D", "VECTOR", "FACTORED")


def norm_constants(spec: Spec) -> dict[str, Any]:
    """Compile-time arguments and warps of norm_kernel: the step's, longest rows walked piece by piece."""
    built = spec.built
    if built.columns > 4096:
        built = Tile(1, 4096, 8, "loop")
    if spec.vector > 1:
        built = built._replace(warps=NORM_WARPS)
    reduction = "loop" if built.reduction in LOOPS else built.reduction
    own = {"R": built.rows, "C": built.columns, "REDUCTION": reduction, "num_warps": built.warps}
    constants = spec.constants()
    return {**{name: constants[name] for name in _NORM_ARGUMENTS}, **own}


def norm_tiles_at_once(spec: Spec) -> int:
    """Tiles that a program of norm_kernel reads before it adds any of them up."""
    constants = norm_constants(spec)
    elements = constants["R"] * constants["C"]
    found: int = tiles_at_once(BYTES, elements, spec.dtypes[1].primitive_bitwidth, spec.vector)
    return found


def norm_launch(
    table,
    grads,
    tiles,
    share,
    partials,
    done,
    control,
    spec: Spec,
    decision: Decision,
    decide: bool,
    backend: str,
) -> Launch:
    """Measures the gradients of a list; of all such launches the last program decides: see control.py.

    `backend` is that of NORM_OPTIONS.
    """
    constants = {**norm_constants(spec), **decision.constants(), "DECIDE": decide, **NORM_OPTIONS[backend]}
    args = (table, grads, tiles, share, partials, done, control)
    return Launch(norm_kernel, programs_for(tiles.shape[0]), args, constants)


def control_launch(squares, control, decision: Decision) -> Launch:
    """Decides, by squares that were added up elsewhere or without a norm: one program."""
    constants = {**decision.constants(), "num_warps": 4, **OPTIONS}
    return Launch(control_kernel, 1, (squares, control), constants)


__all__ = [
    "AVAILABLE",
    "KERNELS",
    "NORM_OPTIONS",
    "OPTIONS",
    "Decision",
    "Launch",
    "Spec",
    "Tile",
    "control_launch",
    "dtype_of",
    "norm_launch",
    "norm_tiles_at_once",
    "parts_of",
    "programs_for",
    "step_launches",
    "tile_for",
]
