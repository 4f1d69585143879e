"""Limits of the gradient norm that follow the training: for `max_norm` of `fusedcalib.clip_grad_norm_`.

What they know lies on the device, in fp64 and always in the same tensors: nothing is waited for, and a
captured graph goes on with it. A norm that is not finite teaches them nothing. `state_dict()` and
`load_state_dict()` are as those of optimizers.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .norms import wide


class Limit:
    """What all of them share: numbers that are kept as tensors. Made on the device that first asks."""

    kept: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what is known so far; {} before the first step."""
        return {name: t.clone() for name, t in self._state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what another has known.

        Raises:
            ValueError: it has other entries.
        """
        if state_dict and {*state_dict} != {*self.kept}:
            raise ValueError(
                f"a state of {type(self).__name__} has {sorted(self.kept)}, this one {sorted(state_dict)}: "
                "load that of the same class"
            )
        new = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in state_dict.items()}
        for name, value in new.items():
            if name in self._state and self._state[name].shape != value.shape:
                raise ValueError(
                    f"{name} has {value.numel()} entries, but {self._state[name].numel()} tensors are "
                    "clipped: load the state of the same parameters"
                )
        if not self._state or not new:
            self._state = {name: value.clone() for name, value in new.items()}
            return
        for name, value in new.items():
            self._state[name].copy_(value)

    def limit(self, norm: Tensor) -> Tensor:
        """The limit for a norm, and learns from it."""
        raise NotImplementedError

    def _on(self, norm: Tensor, **shapes: tuple[int, ...]) -> list[Tensor]:
        """The kept tensors, on the device of the norm: zeros at first."""
        for name in self.kept:
            kept = self._state.get(name)
            if kept is None:
                made = torch.zeros(shapes.get(name, ()), dtype=wide(norm.device), device=norm.device)
                self._state[name] = made
            elif kept.device != norm.device:
                self._state[name] = kept.to(norm.device, wide(norm.device))
        return [self._state[name] for name in self.kept]


def _checked(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it has to lie between {low} and {high}")
    return value


class EMAClip(Limit):
    r"""A multiple of the running mean of the norm.

    .. math::
        c_t = k\, m_{t-1}, \qquad m_t = m_{t-1} + \max\Bigl(1 - \beta, \frac1t\Bigr)
        \bigl(\min(\lVert g_t \rVert, c_t) - m_{t-1}\bigr)

    The mean is that of clipped norms, so one spike does not raise the limit for the next. It is a plain
    average while there are fewer steps than :math:`1/(1-\beta)`.

    Args:
        multiple: k. Default 2.
        beta: :math:`\beta`. Default 0.98.
        warmup_steps: steps in which only `max_norm` limits. Default 10.
        max_norm: a limit that always holds. Default none.

    Raises:
        ValueError: a number out of its range.

    >>> import torch, fusedcalib
    >>> limit = fusedcalib.EMAClip(multiple=2.0, warmup_steps=1)
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> for value in (1.0, 1.0, 100.0):
    ...     weight.grad = torch.tensor([value])
    ...     norm = fusedcalib.clip_grad_norm_([weight], max_norm=limit)
    >>> round(weight.grad.item(), 4)
    2.0
    """

    kept = ("steps", "mean")

    def __init__(
        self,
        multiple: float = 2.0,
        beta: float = 0.98,
        warmup_steps: int = 10,
        max_norm: float = math.inf,
    ) -> None:
        super().__init__()
        self.multiple = _checked("multiple", multiple, 0, math.inf)
        self.beta = _checked("beta", beta, 0, 1)
        self.warmup_steps = _checked("warmup_steps", warmup_steps, 1, math.inf)
        self.max_norm = _checked("max_norm", max_norm, 0, math.inf)

    def limit(self, norm: Tensor) -> Tensor:
        """The limit for a norm, and learns from it."""
        steps, mean = self._on(norm)
        limit = torch.where(steps < self.warmup_steps, math.inf, self.multiple * mean).clamp(
            max=self.max_norm
        )
        finite = norm.isfinite()
        rate = (1 / (steps + 1)).clamp(min=1 - self.beta)
        mean.copy_(torch.where(finite, mean + rate * (torch.minimum(norm, limit) - mean), mean))
        steps.add_(finite)
        return limit


class ZClip(Limit):
    r"""A limit for norms that are outliers of a running mean and deviation.

    .. math::
        z_t = \frac{\lVert g_t \rVert - \mu_{t-1}}{\sigma_{t-1} + 10^{-6}}, \qquad
        c_t = \begin{cases} \mu_{t-1} + \sigma_{t-1} z^2 / z_t & z_t > z \\ \infty & \text{else} \end{cases}

    .. math::
        \mu_t = \alpha \mu_{t-1} + (1-\alpha) \hat g_t, \qquad
        \sigma_t^2 = \alpha \sigma_{t-1}^2 + (1-\alpha) (\hat g_t - \mu_t)^2

    with the norm :math:`\hat g_t = \min(\lVert g_t \rVert, c_t)`. Both begin as mean and variance of
    the first `warmup_steps` norms.

    Args:
        z_threshold: z. Default 2.5.
        alpha: :math:`\alpha`. Default 0.97.
        warmup_steps: steps that only measure, limited by `max_norm`. Default 25.
        max_norm: a limit that always holds. Default none; the authors' code has 1.

    Raises:
        ValueError: a number out of its range.

    Source: Kumar, Owen, Chowdhury, Güra: ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025
    (arXiv 2504.02507).

    >>> import fusedcalib
    >>> limit = fusedcalib.ZClip(z_threshold=2.5)
    >>> limit.state_dict()
    {}
    """

    kept = ("steps", "mean", "variance")

    def __init__(
        self,
        z_threshold: float = 2.5,
        alpha: float = 0.97,
        warmup_steps: int = 25,
        max_norm: float = math.inf,
    ) -> None:
        super().__init__()
        if not z_threshold > 0:
            raise ValueError(f"z_threshold is {z_threshold}; it has to be positive")
        self.z_threshold = z_threshold
        self.alpha = _checked("alpha", alpha, 0, 1)
        self.warmup_steps = _checked("warmup_steps", warmup_steps, 1, math.inf)
        self.max_norm = _checked("max_norm", max_norm, 0, math.inf)

    def limit(self, norm: Tensor) -> Tensor:
        """The limit for a norm, and learns from it."""
        steps, mean, variance = self._on(norm)
        early, finite = steps < self.warmup_steps, norm.isfinite()
        deviation = variance.sqrt()
        z = (norm - mean) / (deviation + 1e-6)
        spike = mean + deviation * self.z_threshold**2 / z
        limit = torch.where((z > self.z_threshold) & ~early, spike, math.inf)
        seen = torch.minimum(norm, limit)
        rate = torch.where(early, 1 / (steps + 1), 1 - self.alpha)
        new = mean + rate * (seen - mean)
        apart = torch.where(early, (seen - mean) * (seen - new), (seen - new).square())
        variance.copy_(torch.where(finite, variance + rate * (apart - variance), variance))
        mean.copy_(torch.where(finite, new, mean))
        steps.add_(finite)
        return limit.clamp(max=self.max_norm)


class AdaGC(Limit):
    r"""A limit for each tensor: a multiple of the running mean of its own norm.

    .. math::
        h_{t,i} = \min\Bigl(1, \frac{\lambda_{rel}\, \gamma_{t-1,i}}{\lVert g_{t,i} \rVert}\Bigr), \qquad
        \gamma_{t,i} = \beta \gamma_{t-1,i} + (1-\beta) \lVert h_{t,i}\, g_{t,i} \rVert

    In the first `warmup_steps` all are clipped to :math:`\lambda_{abs}` by their common norm, and
    :math:`\gamma_i` is the smallest clipped norm so far. A tensor whose gradient is missing or 0 keeps its
    :math:`\gamma_i`: else an expert that is not used would be clipped to 0 for good.

    Args:
        lambda_rel: :math:`\lambda_{rel}`. Default 1.05.
        lambda_abs: :math:`\lambda_{abs}`. Default 1.
        beta: :math:`\beta`. Default 0.98.
        warmup_steps: steps clipped by the common norm. Default 100.

    Raises:
        ValueError: a number out of its range; other tensors than before.

    Source: Wang et al.: AdaGC: Improving Training Stability for Large Language Model Pretraining, 2025
    (arXiv 2502.11034).

    >>> import fusedcalib
    >>> fusedcalib.AdaGC(warmup_steps=10).warmup_steps
    10
    """

    kept = ("steps", "gamma")

    def __init__(
        self,
        lambda_rel: float = 1.05,
        lambda_abs: float = 1.0,
        beta: float = 0.98,
        warmup_steps: int = 100,
    ) -> None:
        super().__init__()
        self.lambda_rel = _checked("lambda_rel", lambda_rel, 0, math.inf)
        self.lambda_abs = _checked("lambda_abs", lambda_abs, 0, math.inf)
        self.beta = _checked("beta", beta, 0, 1)
        self.warmup_steps = _checked("warmup_steps", warmup_steps, 1, math.inf)

    def factors(self, norm: Tensor, each: Tensor) -> Tensor:
        """What to multiply each tensor with, and learns from it. norm: of all; each: of each tensor."""
        steps, gamma = self._on(norm, gamma=tuple(each.shape))
        if gamma.shape != each.shape:
            raise ValueError(
                f"AdaGC has followed {gamma.numel()} tensors, but {each.numel()} are clipped: give the same "
                "parameters at every step"
            )
        early = steps < self.warmup_steps
        common = (self.lambda_abs / (norm + 1e-6)).clamp(max=1)
        own = (self.lambda_rel * gamma / each).clamp(max=1)
        own = torch.where((each == 0) | (gamma == 0), 1, own)
        own = torch.where(early | ~norm.isfinite(), common, own)
        clipped = each * own
        least = torch.where(gamma == 0, clipped, torch.minimum(gamma, clipped))
        new = torch.where(early, least, torch.where(gamma == 0, clipped, gamma.lerp(clipped, 1 - self.beta)))
        gamma.copy_(torch.where((each > 0) & norm.isfinite(), new, gamma))
        steps.add_(norm.isfinite())
        return own
