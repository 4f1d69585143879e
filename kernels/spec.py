"""What is compiled: shapes of tiles, and one value for each specialisation of a kernel."""

from typing import Any, NamedTuple

from .stages import Flags

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

# Of norm_kernel. Programs of few warps: all of them are at work at once, and so the last tiles are the last
# to be read.
NORM_WARPS = 4
NORM_LONGEST = (1, 4096, 8, "loop")  # longer rows are walked piece by piece
# What keeps the memory busy are bytes that are asked for before any is waited for: of several tiles at once
# where elements are small. Sums of fp64 take registers, so that blocks of a tile share them.
NORM_BYTES = 16384  # of gradients that a program reads at a time, 128 a thread
NORM_BLOCK = 1024  # elements of a tile with sums of their own


class Tile(NamedTuple):
    """Shape of a program's tile [rows, columns], the warps that work on it, how rows are added up."""

    rows: int
    columns: int
    warps: int
    reduction: str  # "none" | "tile" | "loop" | "pieces" | "ranks"


class Spec(NamedTuple):
    """One specialisation of the kernels that read slots. No hyperparameter is in it."""

    DTYPES: tuple[Any, ...]  # Triton's, of parameter, gradient, state...
    COMPUTE: Any  # dtype of the arithmetic
    FIELDS: int = 0  # of a row of the table
    COUNT: int = 0  # scalars in a row; 0 where the one row is an argument of its own
    D: int = 0  # inner dimensions of a strided slot, 0 where dense
    QUADS: bool = False  # rows are multiples of four elements, or there is one
    VECTOR: int = 1  # addresses are 16-byte aligned, rows multiples of VECTOR elements; else 1
    FACTORED: bool = False  # rows of the gradient have factors
    KEPT: tuple[
        str, ...
    ] = ()  # how each tensor that rules see is kept, see storage.py; () where all are cast
    RULE: Any = None  # device function
    SQUARES: Any = None  # device function: what norms of the whole tensor are taken of, see totals.py
    FACTOR: Any = None  # device function: what the step makes of them
    SUMS: int = 0  # how many there are
    FLAGS: Flags | None = None
    # Hash of the source of these functions: on disk Triton tells kernels apart by how their constants print,
    # and a function prints its name alone.
    SOURCE: str = ""
    R: int = 1  # rows and columns of a tile
    C: int = 1
    REDUCTION: str = "none"
    WARPS: int = 4

    @property
    def tile(self) -> Tile:
        """The tile as it is compiled."""
        return Tile(self.R, self.C, self.WARPS, self.REDUCTION)

    def of_rule(self, rule: Any, flags: Flags, trust: Any = None) -> "Spec":
        """The same for a rule and its stages. trust: `squares`, `factor`, `sums` of one that wants norms."""
        hashes = getattr(rule, "cache_key", "")
        spec = self._replace(RULE=rule, FLAGS=flags, SOURCE=hashes)
        if flags.trust == "none":
            return spec
        functions = (trust.squares, trust.factor)
        hashes += "".join(getattr(function, "cache_key", "") for function in functions)
        return spec._replace(SQUARES=trust.squares, FACTOR=trust.factor, SUMS=trust.sums, SOURCE=hashes)

    def tiled(self, tile: Tile) -> "Spec":
        """The same for a list of such tiles. Unaligned ones get other shapes, of as many programs."""
        if self.VECTOR == 1:
            if tile.reduction in LOOPS or tile.columns > 4096:
                tile = Tile(*UNALIGNED_LOOP, "ranks" if tile.reduction == "ranks" else "loop")
            elif not self.D:
                tile = tile._replace(warps=UNALIGNED_WARPS)
        return self._shaped(tile)

    def _shaped(self, tile: Tile) -> "Spec":
        return self._replace(R=tile.rows, C=tile.columns, WARPS=tile.warps, REDUCTION=tile.reduction)

    def measured(self) -> "Spec":
        """What norm_kernel has to know of it: nothing of rules, so that slots of many share a kernel."""
        tile = self.tile
        if tile.columns > NORM_LONGEST[1]:
            tile = Tile(*NORM_LONGEST)
        if self.VECTOR > 1:
            tile = tile._replace(warps=NORM_WARPS)
        if tile.reduction in LOOPS:
            tile = tile._replace(reduction="loop")
        blank = Spec(self.DTYPES, self.COMPUTE, self.FIELDS, D=self.D, VECTOR=self.VECTOR)
        return blank._replace(FACTORED=self.FACTORED)._shaped(tile)


class DeciderSpec(NamedTuple):
    """One specialisation of what decides a step: a tape, and whether the norm is looked at."""

    CODE: tuple[int, ...] = ()
    OUTPUTS: tuple[int, ...] = ()  # places on the tape of the scalars and, last, of the product
    LEAVES: int = 0
    CHECK: bool = False  # a step whose norm is not finite is left out


class NormSpec(NamedTuple):
    """One specialisation of norm_kernel."""

    SLOTS: Spec  # rule and flags are blank
    BLOCK: Spec  # the same, R and C those of a block: some rows of a tile, or columns of its one
    AT_ONCE: int  # tiles that a program reads before it adds any of them up
    DECIDER: DeciderSpec | None  # None where sums are added up elsewhere


def norm_spec(spec: Spec, decider: DeciderSpec | None) -> NormSpec:
    """What is compiled of norm_kernel for slots of a Spec."""
    slots = spec.measured()
    elements = slots.R * slots.C
    blocks = max(1, elements // NORM_BLOCK)
    tall, wide = (slots.R // blocks, slots.C) if slots.R > 1 else (1, slots.C // blocks)
    bits = elements * slots.DTYPES[1].primitive_bitwidth
    at_once = max(1, 8 * NORM_BYTES // bits) if slots.VECTOR > 1 else 1
    return NormSpec(slots, slots._replace(R=tall, C=wide), at_once, decider)


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
