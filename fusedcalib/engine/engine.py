"""The engine of an optimizer: what a step is asked for, the plan that fits, the launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..executors.choose import choose
from ..executors.triton.resident import capturing
from ..layout.buckets import Executor, Slot
from ..layout.counts import Counters
from ..layout.inputs import PlanInputs, StepReport
from ..layout.recipe import Asked, Recipe, recipe_of
from ..layout.row_scales import factored, row_factors_of
from ..layout.shards import is_spread, local_of, place_of, redistribute_gradient
from ..layout.tables import Laid
from ..noise import words_for
from ..rule import Rule
from .check_storage import check_storage
from .checks import check_parameter, check_slots, describe, warn_of_flat
from .decide import decider_of
from .guards import OptionGuards
from .offload import reaching_host
from .plan import Plan
from .plans import Plans
from .slots import Live, live_of
from .state import StateBefore, make_state, scales_of, states_of
from .versions import VersionCounters

Groups = Sequence[dict[str, Any]]
State = MutableMapping[Tensor, Any]
Scaling = tuple[Tensor | None, Tensor | None]
UNSCALED: Scaling = (None, None)
_cuda: Any = torch.cuda


class Engine:
    """Steps the param groups of one optimizer.

    Args:
        name: of the optimizer, for errors.
        rule: its update rule.
        backend: "auto", or the name of an executor.
        check: raises where a group cannot be stepped with its options.
        owner: gives the optimizer, whose row factors a step multiplies.

    Attributes:
        plan: of the last step; None where the next one is laid out anew.
        report: what steps have found.
        versions: of the tensors that steps write.
        captured: what CUDA graphs go on reading.
    """

    def __init__(
        self,
        name: str,
        rule: Rule,
        backend: str,
        check: Callable[[dict[str, Any]], None],
        owner: Callable[[], object],
    ) -> None:
        self._name, self._rule, self._backend, self._owner = name, rule, backend, owner
        self._check_options, self._options = check, OptionGuards(rule, check)
        self._counters = Counters()
        self._undo: StateBefore | None = None  # where the last plan is a new one
        self._misplaced: list[Tensor] = []  # whose gradients autograd lays out otherwise than them
        self._warned = False
        self.report = StepReport()
        self.versions = VersionCounters()
        self.captured: list[Any] = []
        self.drop_plans()

    def drop_plans(self) -> None:
        """Has the next step laid out anew."""
        self.plan: Plan | None = None
        self._plans = Plans()

    def step(
        self,
        groups: Groups,
        state: State,
        scaling: Scaling = UNSCALED,
        beside: Callable[[], None] | None = None,
    ) -> bool:
        """Steps every parameter that has a gradient; returns whether it did, as far as the host knows.

        Args:
            groups, state: the optimizer's.
            scaling: the scale of the gradients, and whether one is not finite, of a GradScaler.
            beside: gets ready what goes with the step; what it raises leaves everything as it was.
        """
        plan = self.prepare(groups, state, scaling)
        try:
            if beside is not None:
                beside()
            plan.step(*scaling)
        except BaseException:
            if plan.begun:
                self.drop_plans()
            elif self._undo is not None:
                self._take_back()
            raise
        if not plan.taken and self._undo is not None:  # the state it would have begun with
            self._take_back()
        self._undo = None
        return plan.taken

    def prepare(self, groups: Groups, state: State, scaling: Scaling = UNSCALED) -> Plan:
        """The plan of the coming step: all host work but the launches."""
        asked = self._options.look(groups, *scaling)
        for param in self._misplaced:
            redistribute_gradient(param)
        self._undo, last = None, self.plan
        if last is not None and last.fits(asked, state):
            if last.on_device or _cuda.is_initialized():  # else nothing is captured
                self._note_capture(last)
            last.refresh(asked)
            return last
        plan = self._plans.fitting(asked, state, last)
        if plan is None:
            plan = self._lay_out(asked, state)
        else:
            self.plan = plan
            self._note_capture(plan)
            plan.resume()
            plan.refresh(asked)
        self.plan = plan
        return plan

    def make_states(self, groups: Groups, state: State) -> None:
        """Makes the states of all parameters, before any has been stepped."""
        for number, group in enumerate(groups):
            self._check_options(group)
            recipe = recipe_of(self._rule, group)
            for index, param in enumerate(group["params"]):
                check_storage(describe(self._name, groups, number, index), param, recipe)
                make_state(state, self.versions, param, recipe, group)

    def executor_of(self, param: Tensor) -> Executor:
        """What runs a parameter; a lazily negated or conjugated gradient has no address to hand on."""
        grad = None if param.grad is None else local_of(param.grad)
        lazy = grad is not None and (grad.is_neg() or grad.is_conj())
        found = choose("eager" if lazy else self._backend, param.device, param.dtype)
        return reaching_host(self._name, found, param.device) if self.versions.offload else found

    def _note_capture(self, plan: Plan) -> None:
        """Keeps a plan for the graph that captures it."""
        if not capturing():
            return
        if not plan.needs.remote:
            raise RuntimeError(
                f"{self._name}.step() cannot be captured in a CUDA graph: its numbers come from the "
                "host; construct it with capturable=True"
            )
        if plan not in self.captured:
            self.captured.append(plan)

    def _take_back(self) -> None:
        """Drops the plan and the state that was made for it."""
        if self._undo is not None:
            self._undo.restore()
        self._undo = None
        self.drop_plans()

    # -- a step laid out ----------------------------------------------------------------------

    def _lay_out(self, asked: Asked, state: State) -> Plan:
        """A new plan, ready for its first step; whatever fails leaves state and plans as before."""
        if capturing():
            raise RuntimeError(
                f"{self._name}.step() is captured in a CUDA graph before it is ready for it; "
                "run some steps before, on another stream, with the same options"
            )
        if self._plans.stale:
            self.drop_plans()
        self._undo = StateBefore(state)
        try:
            plan = self._plan_for(asked, state)
            plan.refresh(asked)
        except BaseException:  # as out of memory
            self._take_back()
            raise
        self._plans.keep(plan)
        return plan

    def _plan_for(self, asked: Asked, state: State) -> Plan:
        """Checks everything, then makes missing state, then plans."""
        groups, recipes, shelf = asked.groups, asked.recipes, self._plans.shelf
        live = list(live_of(groups, self._rule))
        factors: list[Tensor | None] = (
            [self._factors(each.param) for each in live] if factored() else [None] * len(live)
        )
        found = [
            shelf.find(each.param, each.group, recipes[each.group], state.get(each.param), factor)
            for each, factor in zip(live, factors, strict=True)
        ]
        self._check(
            live, [each for each, slot in zip(live, found, strict=True) if slot is None], asked, state
        )
        executors = [
            slot.executor if slot else self.executor_of(each.param)
            for slot, each in zip(found, live, strict=True)
        ]
        places = {(executor, each.param.device) for executor, each in zip(executors, live, strict=True)}
        decider = decider_of(self._name, groups, places, asked.needs)
        skips = decider is not None and asked.needs.tentative
        compiled = self._plans.compiled(recipes, groups, skips)
        shelf = self._plans.shelf  # another one, where something else is compiled
        found = [slot if slot and slot.recipe is compiled[slot.group] else None for slot in found]
        self._remember(each.param for each, slot in zip(live, found, strict=True) if slot is None)
        check_slots(self._name, [each.param for each in live])
        slots, fresh = self._slots(live, found, executors, factors, compiled, groups, state)
        everyone = (each.param for each in live)
        kin = (
            np.zeros(len(live))
            if decider is None
            else self._plans.kin(everyone, groups, self.captured, self._name)
        )
        inputs = PlanInputs(
            slots,
            fresh,
            groups,
            asked.stepped,
            state,
            compiled,
            asked.needs,
            self.report,
            self._counters,
            kin,
        )

        def lay(slot: Slot, totals: Tensor | None) -> Laid:
            return shelf.lay(slot, recipes[slot.group], state, totals)

        return Plan(inputs, recipes, decider, self.versions, lay)

    def _remember(self, params: Iterable[Tensor]) -> None:
        assert self._undo is not None
        self._undo.remember(params)

    def _check(self, live: list[Live], unknown: list[Live], asked: Asked, state: State) -> None:
        """Raises where a parameter that is not laid out yet cannot be stepped; warns of flat ones once."""
        self._remember(each.param for each in unknown)
        self._misplaced += [each.param for each in unknown if redistribute_gradient(each.param)]
        for group, index, param in unknown:
            owner = describe(self._name, asked.groups, group, index)
            check_parameter(owner, param, asked.recipes[group], state.get(param, {}), self.versions.offload)
        if not self._warned:
            by_rows = [each.param for each in live if asked.recipes[each.group].flags.by_rows]
            self._warned = warn_of_flat(self._name, by_rows)

    def _slots(
        self,
        live: list[Live],
        known: list[Slot | None],
        executors: list[Executor],
        factors: list[Tensor | None],
        recipes: list[Recipe],
        groups: Groups,
        state: State,
    ) -> tuple[list[Slot], list[bool]]:
        """The slots of a step, and of each whether its state is new; makes the state that is missing."""
        random = any(recipe.flags.random for recipe in recipes)
        words = words_for(groups) if random and not all(known) else {}
        slots, fresh = [], []
        for (group, _, param), slot, executor, factor in zip(live, known, executors, factors, strict=True):
            recipe = recipes[group]
            if slot is not None:
                fresh.append(not recipe.own_states)
            else:
                if self._undo is not None:
                    self._undo.remember_values(param, recipe.storage.of(param).master)
                fresh.append(make_state(state, self.versions, param, recipe, groups[group]))
                states, scales = states_of(state, param, recipe), scales_of(state, param, recipe)
                place = place_of(param) if is_spread(param) else None
                stream = words.get(param, (0, 0, 0))
                slot = Slot(param, states, group, recipe, executor, stream, place, factor, scales)
            slots.append(slot)
        return slots, fresh

    def _factors(self, param: Tensor) -> Tensor | None:
        """The factors of the rows of its gradient, to be multiplied here."""
        found = row_factors_of(param)
        if found and found.optimizer() is not self._owner():
            raise RuntimeError(
                f"{self._name}: a gradient's rows have factors that another optimizer multiplies; "
                "fusedcalib.nn.scale_in_step(model, optimizer) says which one"
            )
        return found.values if found else None
