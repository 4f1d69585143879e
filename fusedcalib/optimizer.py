"""The facade: groups, state, hooks and checkpoints exactly as torch.optim has them. It computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .engine.engine import Engine, Scaling
from .engine.flat import check_gathered
from .engine.offload import check_construction, empty_states
from .engine.state import load_state
from .executors.choose import choose
from .layout.shards import beside, like
from .masters import MasterWeights
from .options import BACKEND, OFFLOAD, check_group, plain
from .rule import Rule
from .signature import declare, documented, extras_of
from .statistics import TrackedSteps
from .storage import VERSION, VERSION_KEY, check_version, keeps_bytes

__all__ = ["FusedOptimizer", "ParamsT"]


@documented
class FusedOptimizer(TrackedSteps, MasterWeights, Optimizer):
    r"""What every optimizer here does: the direction of its `rule`, between stages, in one pass over memory.

    .. math::
        \hat g &= P(g + \lambda \theta + \lambda_1 \mathrm{sign}(\theta)) \\
        \theta &\leftarrow \Pi_c(\theta - \gamma\, u(\hat g))

    with the direction :math:`u` of the rule. :math:`P` removes row means where `centralize` is set,
    :math:`\Pi_c` shortens rows where `max_row_norm` is; both are the identity elsewhere. Gradient noise joins
    :math:`\hat g` before :math:`P`, noise on weights the step before :math:`\Pi_c`. Where decay is
    decoupled :math:`\lambda` is not in the gradient: :math:`\theta` is first scaled by
    :math:`1 - \gamma \lambda`. A row is one index of dimension 0, or what `matrix_dims` says.

    A subclass takes the arguments of the torch.optim class of its name, in their order. Also:

    Args:
        params: parameters, named parameters or param groups, as torch.optim takes them.
        **options: every option of fusedcalib/options.py, as docs/options.md lists them.

    All but `params`, `backend`, `offload`, `fused` and `capturable` may differ between param groups and
    change between steps.

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
        self._offload = options.pop("offload", OFFLOAD.default)
        OFFLOAD.check(self._offload)
        if self._offload:
            check_construction(type(self).__name__, self._backend)
        own = extras_of(type(self), self.rule.extras)
        self._extras = plain({key: options.pop(key, default) for key, default in own.items()})
        self._forget()
        super().__init__(params, *args, **options)
        self.state.clear()  # torch.optim.Adagrad makes its state at once
        self._tell_scaler()

    def _forget(self) -> None:
        """Drops all that is not groups and state."""
        check = partial(check_group, type(self))
        self._engine = Engine(type(self).__name__, self.rule, self._backend, check, ref(self))
        self._engine.versions.offload = self._offload is not None
        self._swapped = False

    def _drop_plans(self) -> None:
        """Has the next step laid out anew."""
        self._engine.drop_plans()

    def _tell_scaler(self) -> None:
        """With fused=True a GradScaler leaves unscaling and skipping to the step, as with torch.optim's."""
        self._step_supports_amp_scaling = bool(self.defaults.get("fused"))

    # -- groups, state, checkpoints -----------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim; its options are checked before anything is changed."""
        for key, value in self._extras.items():
            self.defaults.setdefault(key, value)
        if isinstance(param_group, dict):
            check_group(type(self), {**self.defaults, **param_group})
            param_group.update(plain(param_group))
        self._drop_plans()
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        self._wait()
        own = {"_backend": self._backend, "_extras": self._extras, "_offload": self._offload}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._extras = {**plain(extras_of(type(self), self.rule.extras)), **self._extras}
        self._forget()
        self._tell_scaler()
        for group in self.param_groups:  # a torch.optim checkpoint does not have our keys
            for key, value in self._extras.items():
                group.setdefault(key, value)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a checkpoint needs, as torch.optim; groups with bytes say of which version.

        States that are offloaded are handed out where they lie, on the host, when the GPU is done with them.

        Raises:
            RuntimeError: FSDP1 wants to gather states that it cannot, as 8-bit ones.
        """
        check_gathered(type(self).__name__, self.param_groups)
        self._wait()
        found: dict[str, Any] = super().state_dict()
        for group in found["param_groups"]:
            if keeps_bytes(group):
                group[VERSION_KEY] = VERSION
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of the torch.optim class of its name.

        Unlike torch.optim, state saved in a wider type than the parameter's keeps it: fp32 moments of
        bf16 parameters stay fp32.

        Raises:
            ValueError: the groups are others, or a later version keeps bytes in another form.
        """
        seen: list[dict[str, Any]] = []
        kept = [{key: group[key] for key in self._extras} for group in self.param_groups]

        def look(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any] | None:
            check_version(type(self).__name__, saved["param_groups"])
            seen.append(saved)
            return empty_states(saved) if self._offload else None

        capture = self.register_load_state_dict_pre_hook(look)
        restore = self.register_load_state_dict_post_hook(
            lambda _: self._complete(seen[-1], kept), prepend=True
        )
        before = {"state": self.state, "param_groups": self.param_groups}
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            if self._offload and self.state is not before["state"]:  # as without memory for all of it
                self.__setstate__(before)
            raise
        finally:
            capture.remove()
            restore.remove()

    def _complete(self, saved: dict[str, Any], kept: list[dict[str, Any]]) -> None:
        """Puts back what torch.optim's loading took: our options where the file has none, wider state."""
        for group, own, loaded in zip(self.param_groups, kept, saved["param_groups"], strict=True):
            group.update({key: value for key, value in own.items() if key not in loaded})
            group.pop(VERSION_KEY, None)
        keys = (k for group in saved["param_groups"] for k in group["params"])
        groups = {p: group for group in self.param_groups for p in group["params"]}
        params = (p for group in self.param_groups for p in group["params"])
        for key, param in zip(keys, params, strict=True):
            entry, values = self.state.get(param, {}), saved["state"].get(key, {})
            load_state(entry, values, param, groups[param], self._engine.versions)

    # -- the step -----------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every parameter that has a gradient; returns what the closure returns.

        Args:
            closure: re-evaluates the model and returns the loss; runs first, with gradients enabled.

        Raises:
            RuntimeError, ValueError: a parameter, gradient or option cannot be stepped. Nothing has
                been changed then: parameters, state and counters are as they were.
        """
        loss = self._evaluated(closure)
        with torch.no_grad(), self._tracking() if self._tracked else nullcontext():
            self._engine.step(self.param_groups, self.state, self._scaling())
        return loss

    def _evaluated(self, closure: Callable[[], Any] | None) -> Any:
        """What the closure returns."""
        self._check_weights()
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _check_weights(self) -> None:
        """Raises where parameters are not what is to be stepped."""
        if self._swapped:
            raise RuntimeError("step() within ema_weights(): the parameters are averages; leave it first")

    def _scaling(self) -> Scaling:
        """What a GradScaler has left here: the scale of the gradients, and whether one is not finite."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    # -- what a step leaves -------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """The Euclidean norm of all gradients of the last step, unscaled, before clipping.

        A 0-dim fp32 tensor (fp64 where parameters are) on the device of the parameters; reading it waits for
        nothing. None where no step has measured it: `max_grad_norm` and `skip_nonfinite` do,
        `max_grad_norm=math.inf` without clipping.
        """
        return self._engine.report.norm()

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were left out since construction or loading: 0-dim int64 on the parameters' device.

        Left out by `skip_nonfinite`, or by a GradScaler where the step unscales (`fused=True`).
        """
        return self._engine.report.skipped()

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
                    param.copy_(like(param, beside(param, average)))
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
        names = {choose(self._backend, p.device, p.dtype).name for p in self._params()}
        return "+".join(sorted(names)) or self._backend

    def __repr__(self) -> str:
        try:
            backend = self.backend
        except RuntimeError:  # it cannot run where the parameters are now; a step says why
            backend = self._backend
        offload = f"offload: {self._offload}\n" if self._offload else ""
        return f"{super().__repr__().removesuffix(')')}backend: {backend}\n{offload})"
