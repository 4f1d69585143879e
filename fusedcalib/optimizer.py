"""The facade: groups, state, hooks and checkpoints exactly as torch.optim has them. It computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checks import check_group, check_parameter, check_slots, describe
from .executors import choose
from .plan import Plan, Versions
from .recipe import Recipe, Rule, merged, recipe_of
from .tables import Executor, Slot

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
else:
    ParamsT = Any

__all__ = ["FusedOptimizer", "ParamsT"]

BACKENDS = ("auto", "triton", "numba", "eager")


class FusedOptimizer(Optimizer):
    """Base of every optimizer here. A subclass names its `rule` and its torch.optim-like arguments.

    Args:
        params: as torch.optim.
        centralize, centralize_min_ndim: defaults of the param groups, see `fusedcalib.SGD`.
        backend: "auto", "triton", "numba" or "eager"; for the whole optimizer.
        **options: arguments of the next class, usually the torch.optim class of that name.
    """

    rule: ClassVar[Rule]

    def __init__(
        self,
        params: ParamsT,
        *,
        centralize: bool | str = False,
        centralize_min_ndim: int = 2,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"Invalid backend: {backend!r}, expected one of {', '.join(BACKENDS)}")
        self._backend = backend
        self._extras = {"centralize": centralize, "centralize_min_ndim": centralize_min_ndim}
        self._plan: Plan | None = None
        self._versions = Versions()
        super().__init__(params, **options)
        # Unscaling is the scaler's work: the step does not read grad_scale and found_inf.
        self._step_supports_amp_scaling = False

    # -- groups, state, checkpoints -----------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim; its options are checked before anything is changed."""
        for key, value in self._extras.items():
            self.defaults.setdefault(key, value)
        if isinstance(param_group, dict):
            check_group({**self.defaults, **param_group}, type(self).__name__)
        self._plan = None
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._backend, "_extras": self._extras}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        self._versions = Versions()
        self._step_supports_amp_scaling = False
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
        params = (p for group in self.param_groups for p in group["params"])
        for key, param in zip(keys, params, strict=True):
            for name, value in saved["state"].get(key, {}).items():
                if name == "step" or not isinstance(value, Tensor):
                    continue
                narrowed = self.state[param][name].dtype
                if torch.promote_types(narrowed, value.dtype) != narrowed:
                    self.state[param][name] = value.to(param.device)

    # -- the step -----------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every parameter that has a gradient; returns what the closure returns.

        Args:
            closure: re-evaluates the model and returns the loss; runs first, with gradients enabled.

        Raises:
            RuntimeError, ValueError: a parameter, gradient or option cannot be stepped. Nothing has
                been changed then: parameters, state and counters are as they were.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}.step() cannot be captured in a CUDA graph: its scalars come from "
                "the host; use torch.optim's with capturable=True"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._prepare().run()
        return loss

    def _prepare(self) -> Plan:
        """All host work of a step but the launches."""
        recipes = merged([self._recipe(group) for group in self.param_groups])
        if self._plan is None or not self._plan.holds(recipes, self.param_groups, self.state):
            self._plan = None
            before = {param: dict(entry) for param, entry in self.state.items()}
            try:
                self._plan = self._lay_out(recipes)
            except BaseException:  # as out of memory: take back the state that was made
                for param in list(self.state):
                    if param in before:
                        self.state[param].clear()
                        self.state[param].update(before[param])
                    else:
                        del self.state[param]
                raise
        self._plan.refresh(self.param_groups)
        return self._plan

    def _recipe(self, group: dict[str, Any]) -> Recipe:
        check_group(group, type(self).__name__)
        return recipe_of(self.rule, group)

    def _lay_out(self, recipes: list[Recipe]) -> Plan:
        """Checks everything, then makes missing state, then plans."""
        live = list(self._live())
        for group, index, param in live:
            owner = describe(type(self).__name__, self.param_groups, group, index)
            check_parameter(owner, param, recipes[group], self.state.get(param, {}))
        executors = [self._executor(param) for _, _, param in live]
        check_slots(type(self).__name__, [param for _, _, param in live])
        fresh = [self._make_state(param, recipes[group]) for group, _, param in live]
        slots = [
            Slot(param, self._states(param, recipes[group]), group, recipes[group], executor)
            for (group, _, param), executor in zip(live, executors, strict=True)
        ]
        return Plan(slots, fresh, recipes, self.param_groups, self.state, self._versions)

    def _executor(self, param: Tensor) -> Executor:
        """What runs a parameter; a lazily negated or conjugated gradient has no address to hand on."""
        grad = param.grad
        lazy = grad is not None and (grad.is_neg() or grad.is_conj())
        return choose("eager" if lazy else self._backend, param.device, param.dtype)

    def _live(self) -> Iterator[tuple[int, int, Tensor]]:
        """(group, position in the group, parameter) of the parameters with a gradient."""
        for group, options in enumerate(self.param_groups):
            for index, param in enumerate(options["params"]):
                if param.grad is not None:
                    yield group, index, param

    def _make_state(self, param: Tensor, recipe: Recipe) -> bool:
        """Makes the state that is missing; returns whether all of it was."""
        if not recipe.states and not recipe.rule.counts:
            return True
        entry = self.state[param]
        missing = [name for name in recipe.states if entry.get(name) is None]
        if recipe.rule.counts and "step" not in entry:
            entry["step"] = torch.zeros((), dtype=torch.float32)
        for name in missing:
            entry[name] = self._versions.new_state(param)
        return len(missing) == len(recipe.states)

    def _states(self, param: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
        return tuple(self.state[param][name] for name in recipe.states)

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
