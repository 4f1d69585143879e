"""The engine of an optimizer: what a step is asked for, the plan that fits, the launches."""

from __future__ import annotations

from collections.abc import Callable, Collection, MutableMapping, Sequence
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
from ..layout.row_scales import factors_of
from ..layout.shards import local_of, redistribute_gradient
from ..layout.tables import Laid
from ..noise import words_for
from ..rule import Rule
from .check_stacks import RowWarnings, check_stack
from .check_storage import check_storage
from .checks import check_parameter, check_slots, describe
from .decide import decider_of
from .guards import OptionGuards
from .offload import reaching_host
from .part import Part, Places, check_options, check_rows
from .plan import Plan
from .plans import Plans
from .slots import Live, everyone, live_of, slot_of
from .state import StateBefore, make_state
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
        plan: of the last step of all parameters; None where the next one is laid out anew.
        report: what steps have found.
        versions: of the tensors that steps write.
        captured: what CUDA graphs go on reading.
        options: what groups ask for, and whether to measure.
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
        self._check_options, self.options = check, OptionGuards(rule, check)
        self._counters, self._places = Counters(), Places(name, rule)
        self.undo: StateBefore | None = None  # where the last plan is a new one
        self._misplaced: list[Tensor] = []  # whose gradients autograd lays out otherwise than them
        self._warnings = RowWarnings()
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
        return self.run(self.prepare(groups, state, scaling), scaling, beside)

    def run(self, plan: Plan, scaling: Scaling = UNSCALED, beside: Callable[[], None] | None = None) -> bool:
        """Takes the step that a plan has just been prepared for; as `step`."""
        try:
            if beside is not None:
                beside()
            plan.step(*scaling)
        except BaseException:
            if plan.begun:
                self.drop_plans()
            elif self.undo is not None:
                self.take_back()
            raise
        if not plan.taken and self.undo is not None:  # the state it would have begun with
            self.take_back()
        self.undo = None
        return plan.taken

    def prepare(self, groups: Groups, state: State, scaling: Scaling = UNSCALED) -> Plan:
        """The plan of the coming step: all host work but the launches."""
        asked = self.options.look(groups, *scaling)
        for param in self._misplaced:
            redistribute_gradient(param)
        self.undo, last = None, self.plan
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

    def prepare_part(self, groups: Groups, state: State, params: Sequence[Tensor]) -> Plan:
        """The plan of a step of these parameters only, all of which have gradients: `run` takes it.

        Where it is laid out already it costs nothing for the others. Raises as `step` and `check_parts`.
        """
        asked = self.options.look(groups, *UNSCALED)
        check_options(self._name, groups, asked)
        part, same = self._places.part(groups, params)
        if not same:  # of whose places noise goes by
            self.drop_plans()
        for param in params:
            redistribute_gradient(param)
        self.undo = None
        plan = self._plans.of_part(part.key)
        if plan is None or not plan.fits(part.of(asked), part.watched(state)):
            return self._lay_out(asked, state, part)
        plan.refresh(asked)
        return plan

    def check_parts(self, groups: Groups, params: Collection[Tensor]) -> None:
        """Raises where these parameters cannot be stepped without the others, and says what to do."""
        asked = self.options.look(groups, *UNSCALED)
        check_options(self._name, groups, asked)
        if params:
            live = [each for each in everyone(groups, self._rule) if each.param in params]
            check_rows(self._name, groups, live, asked.recipes)

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

    def take_back(self) -> None:
        """Drops the plan and the state that was made for it."""
        if self.undo is not None:
            self.undo.restore()
        self.undo = None
        self.drop_plans()

    # -- a step laid out ----------------------------------------------------------------------

    def _lay_out(self, asked: Asked, state: State, part: Part | None = None) -> Plan:
        """A new plan, ready for its first step; whatever fails leaves state and plans as before."""
        if capturing():
            raise RuntimeError(
                f"{self._name}.step() is captured in a CUDA graph before it is ready for it; "
                "run some steps before, on another stream, with the same options"
            )
        if self._plans.stale:
            self.drop_plans()
        self.undo = undo = StateBefore(state)
        try:
            plan = self._plan_for(asked, state, undo, part)
            plan.refresh(asked)
        except BaseException:  # as out of memory
            self.take_back()
            raise
        self._plans.keep(plan, part.key if part else None)
        return plan

    def _plan_for(self, asked: Asked, state: State, undo: StateBefore, part: Part | None) -> Plan:
        """Checks everything, then makes missing state, then plans."""
        groups, recipes, shelf = asked.groups, asked.recipes, self._plans.shelf
        live = part.live if part else list(live_of(groups, self._rule))
        if part:
            check_rows(self._name, groups, live, recipes)
        factors = factors_of([each.param for each in live], self._owner(), self._name)
        found = [
            shelf.find(each.param, each.group, recipes[each.group], state.get(each.param), factor)
            for each, factor in zip(live, factors, strict=True)
        ]
        pairs = list(zip(live, found, strict=True))
        unknown = [each for each, slot in pairs if slot is None]
        self._check([] if part else live, unknown, asked, state, undo)  # a part may have no rows by chance
        executors = [slot.executor if slot else self.executor_of(each.param) for each, slot in pairs]
        places = {(executor, each.param.device) for executor, each in zip(executors, live, strict=True)}
        decider = decider_of(self._name, groups, places, asked.needs)
        skips = decider is not None and asked.needs.tentative
        compiled = self._plans.compiled(recipes, groups, skips)
        shelf = self._plans.shelf  # another one, where something else is compiled
        found = [slot if slot and slot.recipe is compiled[slot.group] else None for slot in found]
        undo.remember(each.param for each, slot in zip(live, found, strict=True) if slot is None)
        check_slots(self._name, [each.param for each in live])
        slots, fresh = self._slots(live, found, executors, factors, compiled, groups, state)
        kin = np.zeros(len(live))
        if decider is not None:
            kin = self._plans.kin((each.param for each in live), groups, self.captured, self._name)
        stepped, watched = (part.of(asked).stepped, part.watched(state)) if part else (asked.stepped, state)
        inputs = PlanInputs(
            *(slots, fresh, groups, stepped, watched, state),
            *(compiled, asked.needs, self.report, self._counters, kin),
        )

        def lay(slot: Slot, totals: Tensor | None) -> Laid:
            return shelf.lay(slot, recipes[slot.group], state, totals)

        return Plan(inputs, recipes, decider, self.versions, lay)

    def _check(
        self, live: list[Live], unknown: list[Live], asked: Asked, state: State, undo: StateBefore
    ) -> None:
        """Raises where a parameter that is not laid out yet cannot be stepped; warns of rows."""
        undo.remember(each.param for each in unknown)
        self._misplaced += [each.param for each in unknown if redistribute_gradient(each.param)]
        for group, index, param in unknown:
            owner = describe(self._name, asked.groups, group, index)
            recipe, entry = asked.recipes[group], state.get(param, {})
            check_parameter(owner, param, recipe, entry, self.versions.offload)
            check_stack(owner, param, recipe, entry)
        self._warnings.look(self._name, live, unknown, asked)

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
                if self.undo is not None:
                    self.undo.remember_values(param, recipe.storage_of(param).master)
                fresh.append(make_state(state, self.versions, param, recipe, groups[group]))
                stream = words.get(param, (0, 0, 0))
                slot = slot_of(param, group, recipe, executor, state, stream, factor)
            slots.append(slot)
        return slots, fresh
