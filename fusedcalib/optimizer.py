"""The facade: groups, state, hooks and checkpoints exactly as torch.optim has them. It computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .engine.checks import check_parameter, check_slots, describe, warn_of_flat
from .engine.decide import decides_on_device
from .engine.plan import Plan
from .engine.plans import Plans
from .engine.state import VersionCounters, make_state, state_dtype, states_of
from .executors.choose import choose
from .executors.triton.resident import capturing
from .layout.asked import Asked
from .layout.buckets import Executor, Laid, Slot
from .layout.counts import Counters
from .layout.inputs import PlanInputs, StepReport
from .layout.row_scales import factored, row_factors_of
from .layout.shards import is_spread, local_of, place_of, redistribute_gradient
from .noise import words_for
from .options import BACKEND, check_group, plain
from .rule import Rule
from .signature import declare, documented, extras_of

__all__ = ["FusedOptimizer", "ParamsT"]


@documented
class FusedOptimizer(Optimizer):
    r"""What every optimizer here does: the direction of its `rule`, between stages, in one pass over memory.

    .. math::
        \hat g &= P(g + \lambda \theta + \lambda_1 \mathrm{sign}(\theta)) \\
        \theta &\leftarrow \Pi_c(\theta - \gamma\, u(\hat g))

    with the direction :math:`u` of the rule. :math:`P` removes row means where `centralize` is set,
    :math:`\Pi_c` shortens rows where `max_row_norm` is; both are the identity elsewhere. Gradient noise joins
    :math:`\hat g` before :math:`P`, noise on weights the step before :math:`\Pi_c`. Where decay is
    decoupled :math:`\lambda` is not in the gradient: :math:`\theta` is first scaled by
    :math:`1 - \gamma \lambda`. A row is one index of dimension 0.

    A subclass takes the arguments of the torch.optim class of its name, in their order. Also:

    Args:
        params: parameters, named parameters or param groups, as torch.optim takes them.
        **options: every option of fusedcalib/options.py, as docs/options.md lists them.

    All but `params`, `backend`, `fused` and `capturable` may differ between param groups and change between
    steps.

    Raises:
        ValueError: an option out of range, as torch.optim.

    Sources: centring: Yong et al., "Gradient Centralization", ECCV 2020; decoupled decay: Loshchilov and
    Hutter, ICLR 2019; elastic net: Zou and Hastie 2005; largest norm: Srebro and Shraibman 2005.

    >>> import fusedcalib
    >>> all(issubclass(cls, fusedcalib.FusedOptimizer) for cls in fusedcalib.optimizers().values())
    True
    """

    rule: ClassVar[Rule]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        declare(cls, cls.rule.extras)

    def __init__(self, params: ParamsT, *args: Any, **options: Any) -> None:
        self._backend = options.pop("backend", BACKEND.default)
        BACKEND.check(self._backend)
        own = extras_of(type(self), self.rule.extras)
        self._extras = plain({key: options.pop(key, default) for key, default in own.items()})
        self._forget()
        super().__init__(params, *args, **options)
        self.state.clear()  # torch.optim.Adagrad makes its state at once
        self._tell_scaler()

    def _forget(self) -> None:
        """Drops all that is not groups and state."""
        self._drop_plans()
        self._asked = Asked(self.rule)
        self._counters = Counters()
        # Where the last plan is a new one: the state of parameters for which some may have been made.
        self._before: dict[Tensor, dict[str, Any] | None] | None = None
        self._captured: list[Any] = []  # what graphs go on reading
        self._versions = VersionCounters()
        self._outcome = StepReport()
        self._swapped = self._warned = False
        self._misplaced: list[Tensor] = []  # whose gradients autograd lays out otherwise than them

    def _drop_plans(self) -> None:
        """Has the next step laid out anew."""
        self._plan: Plan | None = None  # of the last step
        self._plans = Plans()

    def _tell_scaler(self) -> None:
        """With fused=True a GradScaler leaves unscaling and skipping to the step, as with torch.optim's."""
        self._step_supports_amp_scaling = bool(self.defaults.get("fused"))

    # -- groups, state, checkpoints -----------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim; its options are checked before anything is changed."""
        for key, value in self._extras.items():
            self.defaults.setdefault(key, value)
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
            param_group.update(plain(param_group))
        self._drop_plans()
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._backend, "_extras": self._extras}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._extras = {**plain(extras_of(type(self), self.rule.extras)), **self._extras}
        self._forget()
        self._tell_scaler()
        for group in self.param_groups:  # a torch.optim checkpoint does not have our keys
            for key, value in self._extras.items():
                group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of the torch.optim class of its name.

        Unlike torch.optim, state saved in a wider type than the parameter's keeps it: fp32 moments of
        bf16 parameters stay fp32.
        """
        seen: list[dict[str, Any]] = []
        kept = [{key: group[key] for key in self._extras} for group in self.param_groups]
        capture = self.register_load_state_dict_pre_hook(lambda _, saved: seen.append(saved))
        restore = self.register_load_state_dict_post_hook(
            lambda _: self._complete(seen[-1], kept), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            capture.remove()
            restore.remove()

    def _complete(self, saved: dict[str, Any], kept: list[dict[str, Any]]) -> None:
        """Puts back what torch.optim's loading took: our options where the file has none, wider state."""
        for group, own, loaded in zip(self.param_groups, kept, saved["param_groups"], strict=True):
            group.update({key: value for key, value in own.items() if key not in loaded})
        keys = (k for group in saved["param_groups"] for k in group["params"])
        groups = {p: group for group in self.param_groups for p in group["params"]}
        params = (p for group in self.param_groups for p in group["params"])
        for key, param in zip(keys, params, strict=True):
            for name, value in saved["state"].get(key, {}).items():
                if name == "step" or not isinstance(value, Tensor):
                    continue
                loaded, dtype = self.state[param][name], state_dtype(groups[param], name, param)
                wider = torch.promote_types(loaded.dtype, value.dtype)
                dtype = dtype or wider
                if dtype != loaded.dtype:
                    self.state[param][name] = value.to(param.device, dtype)

    # -- the step -----------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every parameter that has a gradient; returns what the closure returns.

        Args:
            closure: re-evaluates the model and returns the loss; runs first, with gradients enabled.

        Raises:
            RuntimeError, ValueError: a parameter, gradient or option cannot be stepped. Nothing has
                been changed then: parameters, state and counters are as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            plan = self._prepare()
            try:
                plan.run(*self._scaling())
            except BaseException:
                self._abandon(plan)
                raise
            if not plan.taken and self._before is not None:  # the state it would have begun with
                self._take_back()
        return loss

    def _scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """What a GradScaler has left here: the scale of the gradients, and whether one is not finite."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _prepare(self) -> Plan:
        """All host work of a step but the launches."""
        if self._swapped:
            raise RuntimeError("step() within ema_weights(): the parameters are averages; leave it first")
        asked = self._asked.look(self.param_groups, *self._scaling(), self._check)
        captured = capturing()
        for param in self._misplaced:
            redistribute_gradient(param)
        self._before = None
        plan = self._plans.fitting(asked, self.state)
        if plan is None:
            if captured:
                raise RuntimeError(
                    f"{type(self).__name__}.step() is captured in a CUDA graph before it is ready for it; "
                    "run some steps before, on another stream, with the same options"
                )
            if self._plans.stale:
                self._drop_plans()
            self._before = {}
            try:
                plan = self._lay_out(asked)
                plan.refresh(asked)
            except BaseException:  # as out of memory
                self._take_back()
                raise
            self._plans.keep(plan)
        else:
            self._plan = plan
            if captured:
                self._check_capture()
            plan.refresh(asked)
        self._plan = plan
        return plan

    def _abandon(self, plan: Plan) -> None:
        """Drops what a step that failed has left: if nothing was launched all is as before it."""
        if self._before is not None and not plan.begun:
            self._take_back()
        elif plan.begun:
            self._drop_plans()

    def _remember(self, params: Iterable[Tensor]) -> None:
        """Notes the states of parameters before some is made for a new plan."""
        assert self._before is not None
        for param in params:
            if param not in self._before:
                self._before[param] = dict(self.state[param]) if param in self.state else None

    def _take_back(self) -> None:
        """Drops the plan and the state that was made for it."""
        for param, entry in (self._before or {}).items():
            if entry is None:
                self.state.pop(param, None)
            else:
                self.state[param].clear()
                self.state[param].update(entry)
        self._drop_plans()
        self._before = None

    def _check_capture(self) -> None:
        assert self._plan is not None
        if not self._plan.needs.remote:
            raise RuntimeError(
                f"{type(self).__name__}.step() cannot be captured in a CUDA graph: its numbers come from the "
                "host; construct it with capturable=True"
            )
        if self._plan not in self._captured:
            self._captured.append(self._plan)

    def _check(self, group: dict[str, Any]) -> None:
        check_group(group, type(self))

    def _lay_out(self, asked: Asked) -> Plan:
        """Checks everything, then makes missing state, then plans."""
        recipes, needs = asked.recipes, asked.needs
        live = list(self._live())
        factors = [self._factors(param) for _, _, param in live] if factored() else [None] * len(live)
        entries = [self.state.get(param) for _, _, param in live]
        found = [
            self._plans.shelf.find(param, group, recipes[group], entry, factor)
            for (group, _, param), entry, factor in zip(live, entries, factors, strict=True)
        ]
        unknown = [each for each, slot in zip(live, found, strict=True) if slot is None]
        self._remember(param for _, _, param in unknown)
        self._misplaced += [param for _, _, param in unknown if redistribute_gradient(param)]
        for group, index, param in unknown:
            owner = describe(type(self).__name__, self.param_groups, group, index)
            check_parameter(owner, param, recipes[group], self.state.get(param, {}))
        if not self._warned:
            by_rows = [param for group, _, param in live if recipes[group].flags.by_rows]
            self._warned = warn_of_flat(type(self).__name__, by_rows)
        executors = [
            slot.executor if slot else self._executor(param)
            for slot, (_, _, param) in zip(found, live, strict=True)
        ]
        places = {(e.name, param.device) for e, (_, _, param) in zip(executors, live, strict=True)}
        on_device = decides_on_device(type(self).__name__, self.param_groups, places, needs)
        compiled = self._plans.compiled(recipes, self.param_groups, on_device and needs.tentative)
        found = [slot if slot and slot.recipe is compiled[slot.group] else None for slot in found]
        self._remember(param for (_, _, param), slot in zip(live, found, strict=True) if slot is None)
        check_slots(type(self).__name__, [param for _, _, param in live])
        random = any(recipe.flags.random for recipe in compiled)
        words = words_for(self.param_groups) if random and not all(found) else {}
        slots, fresh = [], []
        for (group, _, param), slot, executor, factor in zip(live, found, executors, factors, strict=True):
            recipe = compiled[group]
            if slot is not None:
                fresh.append(not recipe.own_states)
            else:
                fresh.append(make_state(self.state, self._versions, param, recipe, self.param_groups[group]))
                states = states_of(self.state, param, recipe)
                place = place_of(param) if is_spread(param) else None
                slot = Slot(
                    param, states, group, recipe, executor, words.get(param, (0, 0, 0)), place, factor
                )
            slots.append(slot)
        work = PlanInputs(
            slots,
            fresh,
            self.param_groups,
            self.state,
            compiled,
            needs,
            self._outcome,
            self._counters,
            self._plans.kin((p for _, _, p in live), self.param_groups, self._captured, type(self).__name__)
            if on_device
            else np.zeros(len(live)),
        )
        shelf = self._plans.shelf

        def lay(slot: Slot, totals: Tensor | None) -> Laid:
            return shelf.lay(slot, recipes[slot.group], self.state, totals)

        return Plan(work, recipes, on_device, self._versions, lay)

    def _factors(self, param: Tensor) -> Tensor | None:
        """Of the rows of its gradient, to be multiplied here."""
        found = row_factors_of(param)
        if found and found.optimizer() is not self:
            raise RuntimeError(
                f"{type(self).__name__}: a gradient's rows have factors that another optimizer multiplies; "
                "fusedcalib.nn.scale_in_step(model, optimizer) says which one"
            )
        return found.values if found else None

    def _executor(self, param: Tensor) -> Executor:
        """What runs a parameter; a lazily negated or conjugated gradient has no address to hand on."""
        grad = None if param.grad is None else local_of(param.grad)
        lazy = grad is not None and (grad.is_neg() or grad.is_conj())
        return choose("eager" if lazy else self._backend, param.device, param.dtype)

    def _live(self) -> Iterator[tuple[int, int, Tensor]]:
        """(group, position in the group, parameter) of the parameters with a gradient."""
        for group, options in enumerate(self.param_groups):
            for index, param in enumerate(options["params"]):
                if param.grad is not None:
                    yield group, index, param

    # -- what a step leaves -------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """The Euclidean norm of all gradients of the last step, unscaled, before clipping.

        A 0-dim fp32 tensor (fp64 where parameters are) on the device of the parameters; reading it waits for
        nothing. None where no step has measured it: `max_grad_norm` and `skip_nonfinite` do,
        `max_grad_norm=math.inf` without clipping.
        """
        return self._outcome.norm()

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were left out since construction or loading: 0-dim int64 on the parameters' device.

        Left out by `skip_nonfinite`, or by a GradScaler where the step unscales (`fused=True`).
        """
        return self._outcome.skipped()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Parameters as their averages (`ema_decay`) within a `with`; after it, and an exception, as before.

        Parameters that have no average, having had no gradient or group without `ema_decay`, stay. Takes the
        memory of a copy of the parameters. Buffers, as the statistics of batch norm, are not averaged.
        FSDP2 must not keep parameters gathered from one forward pass to the next: give the root
        `reshard_after_forward=True`, or call `model.reshard()` before and after.

        Raises:
            RuntimeError: no parameter has an average, or within another `ema_weights()`.

        >>> import torch, fusedcalib
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> opt = fusedcalib.SGD([w], lr=1.0, ema_decay=0.5)
        >>> w.grad = torch.full((1,), -8.0)
        >>> opt.step()
        >>> with opt.ema_weights():
        ...     print(w.item())
        4.0
        >>> w.item()
        8.0
        """
        if self._swapped:
            raise RuntimeError("ema_weights() within ema_weights(): the parameters are averages already")
        averages = {p: entry["ema"] for p, entry in self.state.items() if "ema" in entry}
        if not averages:
            raise RuntimeError("ema_weights(): no parameter has an average; set ema_decay and step() first")
        kept = {p: p.detach().clone() for p in averages}
        self._swapped = True
        try:
            with torch.no_grad():
                for param, average in averages.items():
                    param.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for param, values in kept.items():
                    param.copy_(values)
            self._swapped = False

    # -- what runs ----------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """What runs the step: "triton", "numba" or "eager"; joined by "+" where devices differ."""
        params = (p for group in self.param_groups for p in group["params"])
        names = {choose(self._backend, p.device, p.dtype).name for p in params}
        return "+".join(sorted(names)) or self._backend

    def __repr__(self) -> str:
        try:
            backend = self.backend
        except RuntimeError:  # it cannot run where the parameters are now; a step says why
            backend = self._backend
        return f"{super().__repr__().removesuffix(')')}backend: {backend}\n)"
