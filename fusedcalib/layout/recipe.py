"""What is compiled for a param group: its `Recipe`; and what a step is asked for besides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from ..hostmath import Group, is_on, is_remote
from ..kernels.stages import Flags
from ..kernels.storage import CODED
from ..noise import parsed
from ..rule import Rule
from ..storage import MASTERS, state_format
from .stacks import leading_dims
from .storage import BESIDE, CAST, Storage, names_of


@dataclass(frozen=True)
class Recipe:
    """What is compiled for a param group: a specialisation each. Holds no hyperparameter."""

    rule: Rule
    flags: Flags
    min_ndim: int = 2  # fewest dimensions of a tensor that is centred
    seed: int = 0  # of the noise; not compiled, but a plan is made for one
    storage: Storage = CAST  # of parameters and states, as asked for
    forms: tuple[str, ...] = ()  # of the states; not compiled, but where they change states do
    matrix_dims: tuple[int, ...] = ()  # of stacks of matrices; not compiled, but rows are others

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state tensors, in the order the device functions take them."""
        return (*(("ema",) if self.flags.ema else ()), *self.own_states)

    @property
    def own_states(self) -> tuple[str, ...]:
        """Names of the rule's own."""
        return self.rule.states[self.flags.variant]

    @property
    def kinds(self) -> tuple[str, ...]:
        """How the rule's own states are kept."""
        return self.storage.states or ("cast",) * len(self.own_states)

    @property
    def kept(self) -> tuple[str, ...]:
        """How parameter, gradient and states are kept, in their order; () if all are cast."""
        if self.storage == CAST:
            return ()
        return (self.storage.master, "cast", *["cast"] * self.flags.ema, *self.kinds)

    @property
    def keys(self) -> tuple[str, ...]:
        """Those of the state of a parameter that are like it, or keep what is."""
        named = zip(self.own_states, self.kinds, strict=True)
        own = (key for name, kind in named for key in names_of(name, kind))
        beside = BESIDE.get(self.storage.master)
        return (*(("ema",) if self.flags.ema else ()), *own, *((beside,) if beside else ()))

    @property
    def counts(self) -> bool:
        """Whether a parameter's state has its steps: the rule wants them, or chance."""
        return (self.rule.counts and not self.flags.still) or self.flags.random

    def leading(self, param: Tensor) -> int:
        """How many dimensions a row of a parameter is an index of."""
        return leading_dims(param.shape, self.matrix_dims)

    def laid_by(self, param: Tensor) -> int:
        """The same as a step lays it out: 1 where it does not matter which its rows are.

        0 of a vector that is one row, for a rule that keeps a number for each.
        """
        if self.rule.row_state and param.ndim < 2:
            return 0
        compiled = self.for_tensor(param)
        matters = compiled.flags.by_rows or bool({*CODED} & {*compiled.kinds})
        return self.leading(param) if matters else 1

    def storage_of(self, param: Tensor) -> Storage:
        """How a parameter is kept."""
        return self.storage.of(param, self.leading(param))

    def for_tensor(self, param: Tensor) -> Recipe:
        """What is compiled for one tensor, the same on every rank.

        Vectors and scalars have no rows, rows of one element no mean; small ones are not kept in bytes.
        """
        leading, storage = self.leading(param), self.storage
        ndim = 1 + param.ndim - leading  # of a matrix of a stack
        centred = ndim >= max(2, self.min_ndim) and prod(param.shape[leading:]) >= 2
        flags = self.flags._replace(
            centralize=self.flags.centralize if centred else "none",
            project=self.flags.project and ndim >= 2,
        )
        if storage is not CAST:
            storage = self.storage_of(param)
            flags = flags._replace(master=storage.master, dithered=storage.dithered)
        return Recipe(self.rule, flags, storage=storage)  # what is compiled does not depend on the rest


class Needs(NamedTuple):
    """What a step is asked for besides what each of its groups says."""

    measure: bool = False  # the norm of all gradients
    check: bool = False  # to be left out if that is not finite
    scaled: bool = False  # a factor for the gradients
    tentative: bool = False  # it may be left out
    remote: bool = False  # numbers that the host cannot know without waiting
    statistics: bool = False  # to be measured


class Asked(NamedTuple):
    """What the param groups of an optimizer ask for.

    Attributes:
        groups: the param groups.
        stepped: those whose parameters the rule steps.
        recipes: of each group; the same list until one asks for another.
        needs: what the step is asked for besides.
        versions: of each group, a number that changes with its values.
    """

    groups: Sequence[dict[str, Any]] = ()
    stepped: Sequence[dict[str, Any]] = ()
    recipes: list[Recipe] = []  # noqa: RUF012
    needs: Needs = Needs()
    versions: Sequence[int] = ()


def needs_of(groups: Sequence[Group], grad_scale: object, found_inf: object) -> Needs:
    """What a step of these groups is asked for, with what a GradScaler hands over."""
    limits = [group["max_grad_norm"] for group in groups if is_on(group["max_grad_norm"])]
    check = any(group["skip_nonfinite"] for group in groups)
    clipped = any(is_remote(limit) or limit < math.inf for limit in limits)
    measure = check or bool(limits)
    tentative = check or found_inf is not None
    remote = any(group.get("capturable") or _has_remote(group) for group in groups)
    return Needs(measure, check, clipped or grad_scale is not None, tentative, remote)


def _has_remote(group: Group) -> bool:
    """Whether a hyperparameter lies on a device. Asked at every step: types first, in C."""
    betas = group.get("betas", ())
    if Tensor not in map(type, group.values()) and Tensor not in map(type, betas):
        return False
    return any(map(is_remote, [*group.values(), *betas]))


NOTHING = Needs()


def recipe_of(rule: Rule, group: Group, needs: Needs = NOTHING) -> Recipe:
    """The recipe that a param group asks for."""
    centralize = group["centralize"]
    on = {key: is_on(group[key]) for key in ("weight_decay", "l1", "ema_decay")}
    flags = Flags(
        variant=rule.variant(group),
        maximize=bool(group["maximize"]),
        decay=rule.decay(group) if on["weight_decay"] else "none",
        l1=on["l1"],
        centralize="gradient" if centralize is True else centralize or "none",
        project=is_remote(group["max_row_norm"]) or group["max_row_norm"] not in (None, math.inf),
        noise=parsed(group["noise"]).stage,
        scaled=needs.scaled,
        ema=on["ema_decay"],
        rounding="stochastic" if group["stochastic_rounding"] else "nearest",
        trust=rule.trust.scales if rule.trust and rule.trust.adapts(group) else "none",
        statistics=needs.statistics,
        row_state=rule.row_state is not None,
        cautious=bool(group["cautious"]),
        cautious_decay=bool(group["cautious_weight_decay"]) and on["weight_decay"],
    )
    if flags.variant in rule.still:
        flags = flags._replace(still=True)
    forms = tuple(state_format(group["state_dtype"], name) for name in rule.states[flags.variant])
    storage = storage_of(rule, flags.variant, forms, group)
    flags = flags._replace(master=storage.master, dithered=storage.dithered)
    dims = tuple(group["matrix_dims"] or ())
    return Recipe(rule, flags, group["centralize_min_ndim"], group["seed"], storage, forms, dims)


def storage_of(rule: Rule, variant: str, forms: Sequence[str], group: Group) -> Storage:
    """How a param group has its parameters and the states of a rule kept, of which it asks such forms."""
    named = zip(rule.states[variant], forms, strict=True)
    kinds = [_kind(form, name in rule.nonnegative) for name, form in named]
    states = tuple(kinds) if {*kinds} - {"cast"} else ()
    least = group["min_8bit_size"] if "8bit" in forms else 0
    storage = Storage(MASTERS[group["master_weights"]], states, least)
    return CAST if storage == CAST else storage


def _kind(form: str, nonnegative: bool) -> str:
    if form == "8bit":
        return "nonnegative" if nonnegative else "signed"
    return "stochastic" if form == "bfloat16_stochastic" and nonnegative else "cast"


def merged(recipes: list[Recipe]) -> list[Recipe]:
    """One recipe for groups that differ in what a number can switch off: that is exact, a launch not free."""
    alike: dict[Recipe, list[Flags]] = {}
    for r in recipes:
        alike.setdefault(_bare(r), []).append(r.flags)
    return [replace(r, flags=_joined(r.flags, alike[_bare(r)])) for r in recipes]


def _bare(recipe: Recipe) -> Recipe:
    flags = recipe.flags._replace(decay="none", l1=False, project=False)
    return replace(recipe, flags=flags, forms=(), matrix_dims=())


def _joined(own: Flags, others: list[Flags]) -> Flags:
    """A group's flags with all that the others have switched on."""
    decays = [flags.decay for flags in (own, *others) if flags.decay != "none"]
    return own._replace(
        decay=decays[0] if decays else "none",
        l1=any(flags.l1 for flags in others),
        project=any(flags.project for flags in others),
    )
