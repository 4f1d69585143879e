"""What every optimizer says of how its parameters and states are kept."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .engine import masters
from .engine.engine import Engine
from .executors.triton import pinned
from .layout.shards import local_of
from .rule import Rule


class MasterWeights:
    """The part of `FusedOptimizer` that hands master weights and states out and in."""

    rule: ClassVar[Rule]
    param_groups: list[dict[str, Any]]
    state: Any
    state_dict: Any
    _engine: Engine
    _offload: str | None = None  # also of what was pickled before there was such

    def expanded_state_dict(self) -> dict[str, Any]:
        """The state dict as the torch.optim class of its name has it: fp32 states in the place of bytes.

        What parameters have beside them is left out: see `master_state_dict`. Loaded into an optimizer of
        this package, which keeps its own options then, it gives the same bytes again.

        >>> import torch, fusedcalib
        >>> w = torch.nn.Parameter(torch.ones(64, 64))
        >>> w.grad = torch.ones(64, 64)
        >>> opt = fusedcalib.AdamW([w], state_dtype="8bit")
        >>> opt.step()
        >>> sorted(opt.state_dict()["state"][0])
        ['exp_avg_codes', 'exp_avg_scales', 'exp_avg_sq_codes', 'exp_avg_sq_scales', 'step']
        >>> sorted(opt.expanded_state_dict()["state"][0])
        ['exp_avg', 'exp_avg_sq', 'step']
        """
        return masters.expanded(self.state_dict(), self._params(), self.state, self.rule)

    def master_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """The state dict of a model with its parameters in fp32, with the bits that they have beside them.

        Args:
            model: whose parameters are stepped here. Parameters of 32 and more bits, and buffers, are as they
                are; parts of a whole (DTensor) stay such.

        Raises:
            RuntimeError: FSDP1 has made flat parts of the model's parameters.

        >>> import torch, fusedcalib
        >>> model = torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
        >>> opt = fusedcalib.SGD(model.parameters(), lr=2**-12, master_weights="split16")
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> model.weight.grad = torch.ones_like(model.weight)
        >>> opt.step()
        >>> model.weight.tolist(), opt.master_state_dict(model)["weight"].tolist()
        ([[1.0, 1.0]], [[0.999755859375, 0.999755859375]])
        """
        return masters.master_weights(model, self.state)

    def load_master_state_dict(self, model: torch.nn.Module, weights: dict[str, Any]) -> None:
        """Sets a model's parameters, and what they have beside them, from fp32 ones; and its buffers.

        Args:
            model: whose parameters are stepped here.
            weights: what `master_state_dict` gave, or the state dict of such a model in fp32.

        Raises:
            RuntimeError: names or shapes are not the model's, or FSDP1 has made flat parts of them. Nothing
                is changed then.
        """
        masters.load_master_weights(model, weights, self.param_groups, self.state, self._engine.versions)

    def refresh_master_weights(self) -> None:
        """Takes parameters that were written from outside for what they are, without what is beside them.

        With `master_weights="float32"` a step reads the copy alone: what was written is lost without this.
        """
        masters.refresh(self._params(), self.state, self._engine.versions)

    def state_bytes(self) -> dict[str, int]:
        """Bytes that lie here: "parameters", "gradients", each key of the state, and their "total".

        Where states are offloaded also "host": how many of the total are in pinned host memory.
        """
        return masters.resident_bytes(self._params(), self.state, self._offload is not None)

    @property
    def offload(self) -> str | None:
        """What lies in pinned host memory, as constructed: "states", or None where nothing does.

        It is not changed later: `load_state_dict` of an optimizer constructed otherwise takes all over.
        """
        return self._offload

    def _wait(self) -> None:
        """Waits until no kernel writes states that the host is going to read."""
        if self._offload:
            pinned.wait({local_of(p).device for p in self._params()})

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]
