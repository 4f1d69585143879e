"""The facade: groups, state, hooks and checkpoints exactly as torch.optim has them. It computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from .engine.checks import check_group
from .engine.engine import Engine, Scaling
from .engine.state import state_dtype
from .executors.choose import BACKENDS, choose
from .options import Options, check_ranges, extras_of, plain, signature_of
from .rule import Rule

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
else:
    ParamsT = Any

__all__ = ["FusedOptimizer", "ParamsT"]


def check_options(cls: type[FusedOptimizer], group: dict[str, Any]) -> None:
    """Raises where a param group of a class has an option out of range."""
    check_group(group, cls.__name__)
    if issubclass(cls, Options):  # torch.optim's own classes check what they are constructed with
        check_ranges(group, cls)
    cls.rule.check(group)


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
        maximize: ascend instead of descend: the gradient changes sign, penalties do not. Default False.
        foreach: accepted for compatibility.
        fused: with True the step also unscales for a `torch.amp.GradScaler`, and leaves itself out where a
            gradient is not finite, without rewriting gradients or waiting for the device. Every step is one
            fused pass. Default None.
        capturable: count steps and compute the numbers of a step on the GPU, so that it can be captured in
            a CUDA graph; a replay reads a learning rate (or other hyperparameter) that is a tensor on
            the GPU anew. Default False.
        differentiable: must be False.
        centralize: remove the mean of each row from the gradient (True or "gradient") or from the update
            ("update"); tensors of one dimension and rows of one element stay as they are. Default False.
        centralize_min_ndim: centre tensors of at least this many dimensions; 4 means convolutions
            only. Default 2.
        l1: L1 penalty :math:`\lambda_1`, added to the gradient times the sign of the parameter (0 at 0), in
            units of the gradient; with `weight_decay` the elastic net. Default 0.
        max_row_norm: largest Euclidean norm :math:`c` of a row after a step, in units of the parameter, for
            tensors of two dimensions or more; longer rows are scaled down. Default None: no limit.
        noise: `fusedcalib.GradientNoise`, `WeightNoise` or `LangevinNoise`, Gaussian noise on the gradient
            before centring or on the parameter after the step; as a dict in param groups. Default None.
        seed: of noise and stochastic rounding, an int of 64 bits. They are the same whatever the device, the
            order of the parameters or how they are grouped, and go on where a checkpoint left them. A
            parameter's follow its name, where parameters are named, else its place among all. Default 0.
        max_grad_norm: largest Euclidean norm of all gradients together, in units of the gradient: they are
            scaled down to it as by `torch.nn.utils.clip_grad_norm_`, but in the step, without changing
            `p.grad`. The norm is of all groups; a group may have a limit of its own. `grad_norm` is the
            norm; `math.inf` only measures it. Default None: no limit.
        skip_nonfinite: leave a step out whose gradients are not all finite: parameters, state and counters
            stay; `skipped_steps` counts. For all groups if for one. Default False.
        ema_decay: :math:`\beta` of an exponential moving average of the parameter,
            :math:`\bar\theta \leftarrow \beta \bar\theta + (1 - \beta) \theta`, in [0, 1), from the parameter
            before the first step on; in fp32, as the state `ema`. `ema_weights()` swaps it in. Default
            None: no average.
        stochastic_rounding: round bf16 parameters to one of their two neighbours at random, such that the
            mean is right, by `seed`; parameters of 32 and more bits are not affected. Default False.
        state_dtype: of the states that are like the parameter: torch.float32, bfloat16, float16 or
            float64; kept by load_state_dict. Default None: the parameter's, as torch.optim.
        backend: "auto", "triton", "numba" or "eager"; for the whole optimizer.

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
        extras = {**extras_of(cls, cls.rule.extras), "backend": "auto"}
        cls.__signature__ = signature_of(cls, extras)  # type: ignore[attr-defined]

    def __init__(self, params: ParamsT, *args: Any, **options: Any) -> None:
        backend = options.pop("backend", "auto")
        if backend not in BACKENDS:
            raise ValueError(f"Invalid backend: {backend!r}, expected one of {', '.join(BACKENDS)}")
        self._backend = backend
        own = extras_of(type(self), self.rule.extras)
        self._extras = plain({key: options.pop(key, default) for key, default in own.items()})
        self._forget()
        super().__init__(params, *args, **options)
        self.state.clear()  # torch.optim.Adagrad makes its state at once
        self._tell_scaler()

    def _forget(self) -> None:
        """Drops all that is not groups and state."""
        check = partial(check_options, type(self))
        self._engine = Engine(type(self).__name__, self.rule, self._backend, check, ref(self))
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
            check_options(type(self), {**self.defaults, **param_group})
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
        loss = self._evaluated(closure)
        with torch.no_grad():
            self._engine.step(self.param_groups, self.state, self._scaling())
        return loss

    def _evaluated(self, closure: Callable[[], Any] | None) -> Any:
        """What the closure returns."""
        if self._swapped:
            raise RuntimeError("step() within ema_weights(): the parameters are averages; leave it first")
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

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
