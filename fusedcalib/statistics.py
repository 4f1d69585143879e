"""Statistics of steps: what every optimizer says of gradients, updates and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .engine.engine import Engine
from .layout import statistics as measured

# By name: the key that Composer's OptimizerMonitor has for it, if it has one.
NAMES: dict[str, str | None] = {
    "grad_norm": "l2_norm/grad",
    "update_norm": "l2_norm/update",
    "update_rms": None,
    "update_ratio": None,
    "param_norm": "l2_norm/param",
    "max_abs_grad": None,
    "nonfinite": None,
    "unmoved": None,
    "cosine": "cosine/update_grad",
}
STYLES = ("plain", "composer")


class TrackedSteps:
    """The part of `FusedOptimizer` that measures steps."""

    param_groups: list[dict[str, Any]]
    _engine: Engine
    _tracked: tuple[str, ...] = ()
    _every = 1
    _begun = 0  # steps since track()
    _measured: measured.Statistics | None = None

    def track(self, *names: str, every: int = 1) -> None:
        r"""Has steps measured in their own pass over memory; without names no longer.

        With gradient :math:`g` (`p.grad`; unscaled where the step unscales, not yet clipped), weights
        :math:`\theta_t` as they are kept after the step, and :math:`\Delta = \theta_t - \theta_{t-1}`:

        .. math::
            \mathrm{grad\_norm} &= \lVert g \rVert_2, \quad
            \mathrm{update\_norm} = \lVert \Delta \rVert_2, \quad
            \mathrm{param\_norm} = \lVert \theta_t \rVert_2 \\
            \mathrm{update\_rms} &= \lVert \Delta \rVert_2 / \sqrt n, \quad
            \mathrm{update\_ratio} = \lVert \Delta \rVert_2 / \lVert \theta_t \rVert_2 \\
            \mathrm{cosine} &= - \langle \Delta, g \rangle / (\lVert \Delta \rVert_2 \lVert g \rVert_2)

        The cosine is 0 where one of the two is. Also "max_abs_grad", the largest :math:`|g|` (NaN if one is);
        "nonfinite", how many elements of :math:`g` are not finite; "unmoved", the fraction of the :math:`n`
        weights that are what they were (with what a parameter has beside it): too small a step for bf16, say.
        Sums are fp64. Parameters without gradients have none of these; a step that is left out leaves
        those of the one before. Checkpoints and copies of the optimizer do not track.

        Args:
            names: of what to measure, as above.
            every: measure the first step and every so many after it. In between runs what would run without
                statistics. A captured graph measures at each replay what it measured when it was captured.

        Raises:
            ValueError: a name is none of these, or `every` is not a whole number from 1 on. Steps raise
                RuntimeError where `max_row_norm` is set, or gradients are released: both are refused.

        Sources: keys of Composer's OptimizerMonitor; the cosine as there is that of the step downwards.

        >>> import torch, fusedcalib
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> w.grad = torch.tensor([0.0, 2.0])
        >>> opt = fusedcalib.SGD([("w", w)], lr=1.0)
        >>> opt.track("grad_norm", "unmoved")
        >>> opt.step()
        >>> {key: value.item() for key, value in opt.statistics().items()}
        {'grad_norm': 2.0, 'grad_norm/w': 2.0, 'unmoved': 0.5, 'unmoved/w': 0.5}
        """
        unknown = sorted({*names} - NAMES.keys())
        if unknown:
            raise ValueError(f"track(): {unknown[0]!r} is no statistic; choose from {', '.join(NAMES)}")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"track(): every={every!r}, expected a whole number of steps from 1 on")
        self._tracked, self._every, self._begun = tuple(n for n in NAMES if n in names), every, 0
        self._measured = None
        self._engine.options.statistics = bool(names)  # for whoever steps otherwise

    def statistics(self, style: str = "plain") -> dict[str, Tensor]:
        """What the last measured step was: 0-dim fp64 tensors on its device, for which nothing waits.

        The key "grad_norm" is that of all parameters together, "grad_norm/layer.weight" of one. Parameters
        have the names that the optimizer was given (`named_parameters()`), else "group.index". Parts of whole
        tensors (DTensor) are added up over their ranks: every rank finds the same. Empty before the first
        measured step. The tensors are new ones at each call: call it again after a captured graph's replay.

        Args:
            style: "plain", or "composer": "l2_norm/grad/global", "l2_norm/grad/layer.weight" and so on where
                Composer's OptimizerMonitor has a key for it.

        Raises:
            ValueError: there is no such style.
        """
        if style not in STYLES:
            raise ValueError(f"statistics(): style={style!r}, expected one of {', '.join(STYLES)}")
        if self._measured is None:
            return {}
        names = _names_of(self.param_groups)
        params = [names.get(id(param), "removed") for param in self._measured.params]
        with torch.no_grad():
            found = _values(self._measured)
        keys = {n: NAMES[n] if style == "composer" and NAMES[n] else n for n in self._tracked}
        last = {key: f"{key}/global" if style == "composer" and key != n else key for n, key in keys.items()}
        every: dict[str, Tensor] = {}
        for name, key in keys.items():
            whole, *each = found[name].unbind()
            every |= {str(last[key]): whole}
            every |= {f"{key}/{param}": value for param, value in zip(params, each, strict=True)}
        return every

    @contextmanager
    def _tracking(self) -> Iterator[None]:
        """Around a step: has it measured if it is its turn, and notes where that is left."""
        due = bool(self._tracked) and self._begun % self._every == 0
        self._engine.options.statistics = due
        yield
        self._begun += 1
        self._engine.options.statistics = bool(self._tracked)  # for whoever steps otherwise
        plan = self._engine.plan
        if due and plan is not None and plan.taken and plan.statistics.parts:
            self._measured = plan.statistics


def _names_of(groups: list[dict[str, Any]]) -> dict[int, str]:
    """What parameters are called, by their identities."""
    found: dict[int, str] = {}
    for number, group in enumerate(groups):
        params = group["params"]
        names = group.get("param_names") or [f"{number}.{index}" for index in range(len(params))]
        found |= {id(param): name for param, name in zip(params, names, strict=True)}
    return found


def _values(measured: measured.Statistics) -> Mapping[str, Tensor]:
    """Of each statistic fp64 [parameters + 1], the first that of all."""
    parts = [part for _, part in sorted(measured.parts.items())]  # as the parameters
    there = parts[0].device
    each = torch.stack([part.to(there, non_blocking=True) for part in parts])
    largest = each[:, -1]
    sums = torch.cat([each[:, :-1].sum(0, keepdim=True), each[:, :-1]])
    largest = torch.cat([largest.max().reshape(1), largest])
    sizes = [param.numel() * (1 + param.is_complex()) for param in measured.params]
    counts = sums.new_ones(len(sizes) + 1)
    for place, size in enumerate([sum(sizes), *sizes]):  # filled on the device, for which nothing waits
        counts[place].fill_(size)
    squares, changes, weights, products, unmoved, nonfinite = sums.unbind(1)
    scale = 1.0 if measured.scale is None else measured.scale
    lengths = (squares * changes).sqrt()
    update = changes.sqrt()
    return {
        "grad_norm": squares.sqrt() / scale,
        "update_norm": update,
        "update_rms": (changes / counts).sqrt(),
        "update_ratio": update / weights.sqrt(),
        "param_norm": weights.sqrt(),
        "max_abs_grad": largest / scale,
        "nonfinite": nonfinite,
        "unmoved": unmoved / counts,
        "cosine": torch.where(lengths == 0, 0.0, -products / lengths),
    }
