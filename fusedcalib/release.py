"""Gradient release: parameters are stepped within the backward pass, and their gradients freed at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn

from .engine.flat import is_flat
from .engine.plan import Plan
from .engine.slots import everyone
from .layout.shards import local_of
from .optimizer import FusedOptimizer

# Wrappers that need gradients after they were freed, by the names of their classes.
WRAPPERS = {
    "DistributedDataParallel": "its reducer copies gradients back after they were freed",
    "FullyShardedDataParallel": "FSDP1 keeps gradients of many parameters in one vector",
    "DeepSpeedEngine": "DeepSpeed collects gradients itself",
}
_models: WeakSet[nn.Module] = WeakSet()  # whose gradients are released
_optimizers: WeakSet[FusedOptimizer] = WeakSet()


def enable_gradient_release(
    model: nn.Module, optimizer: FusedOptimizer, bucket_bytes: int = 64 << 20
) -> GradientRelease:
    r"""Has parameters stepped within the backward pass, and frees each gradient when its bucket was stepped.

    Gradients then take `bucket_bytes` and the largest of them at most, and not as much as all parameters.
    `optimizer.step()` after the backward pass steps what is left and ends the step: hooks, schedulers and
    counters go as usual, and the parameters have the bits of `backward(); step()`. `zero_grad()` finds
    nothing to do.

    Args:
        model: whose parameters are stepped so, after `fully_shard` or `parallelize_module`. Those that are
            frozen, or in no param group, are left alone; those of the optimizer that the model has not, and
            those that join later, are stepped by `optimizer.step()` as always.
        optimizer: an optimizer of this package.
        bucket_bytes: gradients that are collected before a launch, in bytes; the last bucket may be smaller.
            0 steps each at once. Default 64 MiB.

    Returns:
        A handle: `paused()`, `discard()`, `remove()`. As a context manager it is removed at the end.

    Hyperparameters are read in the backward pass: set the learning rate before it. Between two `step()` one
    backward pass only may release; those before it accumulate within `handle.paused()`.

    An exception in the backward pass, Ctrl-C too, leaves some parameters stepped, once, and others with their
    gradients: `optimizer.step()` finishes the step, `handle.discard()` drops the rest of it.

    Raises:
        TypeError: the optimizer is none of this package.
        ValueError: `bucket_bytes` is negative.
        RuntimeError: what needs all gradients at once, or gradients that are not freed: `max_grad_norm`,
            `skip_nonfinite`, `capturable`, a GradScaler, closures, DDP, FSDP1, DeepSpeed, rows that lie on
            several ranks. Said here, or where it is met first; nothing has been changed then. Only a
            GradScaler without fp16 autocast is met no sooner than in `step()`, after a backward pass.

    >>> import torch, fusedcalib
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> opt = fusedcalib.SGD(model.parameters(), lr=1.0)
    >>> with fusedcalib.enable_gradient_release(model, opt, bucket_bytes=0):
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     print(model.weight.grad, model.weight.tolist())
    ...     opt.step()
    None [[-1.0, -1.0]]
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"{type(optimizer).__name__} is no optimizer of fusedcalib, and only those release gradients; "
            "give the optimizer itself where a framework has wrapped it"
        )
    if optimizer in _optimizers:
        raise RuntimeError(f"{_name(optimizer)}: gradients are released already; remove() that handle first")
    if not bucket_bytes >= 0:
        raise ValueError(f"Invalid bucket_bytes: {bucket_bytes}, expected a number >= 0")
    params = _released(model, optimizer)
    optimizer._engine.check_parts(optimizer.param_groups, {*params})
    return GradientRelease(model, optimizer, params, bucket_bytes)


def _released(model: nn.Module, optimizer: FusedOptimizer) -> list[Tensor]:
    """The parameters of a model whose gradients are released; raises where they cannot be."""
    for module in model.modules():
        _check_wrapper(module)
    own = {*model.parameters()}
    stepped = [each.param for each in everyone(optimizer.param_groups, optimizer.rule)]
    params = [param for param in stepped if param in own and param.requires_grad]
    if not params:
        raise RuntimeError(
            f"{_name(optimizer)}: no trainable parameter of {type(model).__name__} is in its param groups; "
            "make the optimizer after the model was moved and sharded, of the same model"
        )
    if any(map(is_flat, params)):
        raise RuntimeError(
            f"{_name(optimizer)}: gradients of flat parameters, of FSDP1 or DeepSpeed, cannot be released; "
            "use FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
    return params


class GradientRelease:
    """The handle of `enable_gradient_release`, which makes it.

    Args:
        model, optimizer: as there.
        params: the parameters whose gradients are released.
        bucket_bytes: as there.
    """

    def __init__(
        self, model: nn.Module, optimizer: FusedOptimizer, params: list[Tensor], bucket_bytes: int
    ) -> None:
        self._model, self._optimizer, self._params = model, optimizer, params
        self._bucket_bytes, self._pauses = bucket_bytes, 0
        self._lock = RLock()  # gradients of several devices come by threads of their own
        self._seen: set[int] = set()  # parameters whose gradients have come since the last step
        self._waiting: dict[torch.device, list[Tensor]] = {}  # for their bucket to be full
        self._bytes: dict[torch.device, int] = {}  # of their gradients
        self._begun: tuple[Plan, torch.device] | None = None  # the bucket that is being stepped
        # Python does not find circles through a tensor's hooks: those must not keep the optimizer alive.
        hook, untyped = partial(_collect_in, ref(self)), list[Any](params)
        self._hooks = [param.register_post_accumulate_grad_hook(hook) for param in untyped]
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        self._hooks.append(model.register_forward_pre_hook(_check_forward))
        _models.add(model)
        _optimizers.add(optimizer)
        optimizer._step_supports_amp_scaling = True  # a GradScaler then comes to step(), which refuses it

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it gradients accumulate, and nothing is stepped: for all micro-batches but the last."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def discard(self) -> None:
        """Drops the gradients that are left, as after an exception in the backward pass.

        Parameters that have been stepped in it stay stepped, and count one step more than the others. The
        next backward pass begins another step.
        """
        with self._lock:
            self._end_bucket()
            self._forget()

    def remove(self) -> None:
        """Makes model and optimizer what they were; gradients that are left are for the next `step()`.

        Done already it does nothing.
        """
        with self._lock:
            if not self._hooks:
                return
            self._end_bucket()
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            _models.discard(self._model)
            _optimizers.discard(self._optimizer)
            self._optimizer._tell_scaler()
            self._optimizer._drop_plans()

    # -- a step ---------------------------------------------------------------------------------

    def _collect(self, param: Tensor) -> None:
        """Takes a parameter whose gradient has come; steps its bucket where that is full, or the last."""
        with self._lock:
            self._end_bucket()
            if id(param) in self._seen:
                raise RuntimeError(
                    f"{_name(self._optimizer)}: a second gradient of a parameter within a step, which has "
                    "released the first; call optimizer.step() after each backward pass, or "
                    "handle.discard() after one that failed, and run all but the last of several within "
                    "`with handle.paused():`"
                )
            if self._pauses or param.grad is None:
                return
            device, grad = param.device, local_of(param.grad)
            size = self._bytes.get(device, 0) + grad.numel() * grad.element_size()
            self._waiting.setdefault(device, []).append(param)
            self._bytes[device] = size
            self._seen.add(id(param))
            if size >= self._bucket_bytes or len(self._seen) == len(self._params):
                self._step(device)

    @torch.no_grad()
    def _step(self, device: torch.device) -> None:
        """Steps a bucket and frees its gradients."""
        optimizer = self._optimizer
        optimizer._check_weights()
        params = [param for param in self._waiting[device] if param.grad is not None]
        plan = optimizer._engine.prepare_part(optimizer.param_groups, optimizer.state, params)
        self._begun = plan, device
        try:
            optimizer._engine.run(plan)
        finally:
            self._end_bucket()

    def _end_bucket(self) -> None:
        """Frees the gradients of the bucket that was being stepped, if anything of it was.

        Done once more by whatever comes next, if an interrupt has come amid it.
        """
        if self._begun is None:
            return
        plan, device = self._begun
        if plan.begun:
            for param in self._waiting.get(device, ()):
                param.grad = None
            self._waiting.pop(device, None)
            self._bytes.pop(device, None)
        self._begun = None

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses what a step is not told otherwise of; what is left is stepped after it."""
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise RuntimeError(
                f"{_name(optimizer)}: a closure would step its parameters itself; call backward() and then "
                "step() without one, or remove() the gradient release"
            )
        scaled = [name for name in ("grad_scale", "found_inf") if hasattr(optimizer, name)]
        for name in scaled:  # which a scaler would take back only after the step
            delattr(optimizer, name)
        if scaled:
            raise RuntimeError(
                f"{_name(optimizer)}: a GradScaler unscales gradients after the backward pass, when they are "
                "released; use bf16 without one, or remove() the gradient release"
            )
        optimizer._engine.check_parts(optimizer.param_groups, ())
        with self._lock:
            self._end_bucket()

    def _after_step(self, *_: object) -> None:
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        """Begins another step."""
        for param in self._params:
            param.grad = None
        self._waiting.clear()
        self._bytes.clear()
        self._seen.clear()


def _collect_in(handle: ref[GradientRelease], param: Tensor) -> None:
    """Hands a parameter whose gradient has come to the handle that waits for it, if that lives."""
    found = handle()
    if found is not None:
        found._collect(param)


def _name(optimizer: object) -> str:
    return type(optimizer).__name__


def _check_wrapper(module: nn.Module) -> None:
    """Raises where a module keeps gradients itself."""
    for cls in type(module).__mro__:
        if cls.__name__ in WRAPPERS:
            raise RuntimeError(
                f"{cls.__name__}: gradients cannot be released, as {WRAPPERS[cls.__name__]}; use FSDP2 "
                "(torch.distributed.fsdp.fully_shard)"
            )


def _check_forward(module: nn.Module, _: Any) -> None:
    """Raises where a model is called by what its gradients cannot be released under.

    It knows no handle, so that a copy of the model copies neither that nor the optimizer.
    """
    if module not in _models:
        return
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise RuntimeError(
                f"{_name(module)}: fp16 autocast needs a GradScaler, which unscales gradients when they are "
                "released; use torch.autocast(..., dtype=torch.bfloat16) without one"
            )
    if torch.distributed.is_available():
        wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
        if wrapper is not None:
            _check_wrapper(wrapper)
