"""Checkpoints of other libraries' 8-bit optimizers, decoded to what torch.optim and fusedcalib load.

Neither library is imported; torchao must be there while `torch.load` reads a file of its tensor classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["from_bitsandbytes", "from_torchao"]

StateDict = Mapping[str, Any]

# What state1 and state2 of bitsandbytes are called in the optimizer of a name.
STATES = {
    "Adam": ("exp_avg", "exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "Lion": ("exp_avg",),
    "SGD": ("momentum_buffer",),
    "RMSprop": ("square_avg",),
    "Adagrad": ("sum",),
}
UNCOUNTED = ("Lion", "SGD")  # keep no step
ONE_STATE = tuple(name for name, states in STATES.items() if len(states) == 1)
BLOCKS = (256, 2048)  # of bitsandbytes, since 0.44 and before
NESTED = "__bnb_optimizer_quant_state__"  # since 0.49.2 a dict of its own holds what FSDP must not gather
KNOWN = {f"{name}{i}" for name in ("state", "qmap", "absmax", "max", "new_max") for i in (1, 2)}
KNOWN |= {"step", "unorm_vec", "gnorm_vec"}


def from_bitsandbytes(state_dict: StateDict, optimizer: str | None = None) -> dict[str, Any]:
    r"""Decode the state_dict of a bitsandbytes optimizer, 8 or 32 bits, into one of torch.optim.

    .. math:: x_i = \mathrm{qmap}[c_i] \cdot \mathrm{absmax}[\lfloor i / 256 \rfloor]

    with i the row-major index of an element in the whole tensor and c its code; blocks of 2048 before version
    0.44, and `max1`, `max2` for the whole tensor where `block_wise=False`. Parameters below `min_8bit_size`
    and optimizers of 32 bits have plain states. All become fp32, step a tensor.

    Options of groups are translated to what the library computes: its Adam decays weights as AdamW does, its
    SGD knows neither dampening nor Nesterov momentum, its RMSprop no momentum.

    Args:
        state_dict: what `state_dict()` of an optimizer of bitsandbytes returned, or `torch.load` of it.
        optimizer: the class that is to load the result, in torch.optim or fusedcalib: "Adam", "AdamW",
            "Lion", "SGD", "RMSprop" or "Adagrad". None is AdamW where parameters have two states; where they
            have one, the dict does not say what it is.

    Returns:
        The dict that `load_state_dict` of that class takes. Tensors that were fp32 are shared with the
        argument.

    Raises:
        ValueError: something in the dict is not known, with the place where it stands, or the optimizer has
            to be named.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, section 2; names and
    shapes as bitsandbytes 0.32 to 0.50 saves them.

    >>> import torch
    >>> from fusedcalib.checkpoints import from_bitsandbytes
    >>> codes = torch.tensor([0, 128, 255], dtype=torch.uint8)
    >>> entry = {"step": 7, "state1": codes, "qmap1": torch.arange(256) / 255, "absmax1": torch.tensor([2.0])}
    >>> groups = [{"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.0, "params": [0]}]
    >>> from_bitsandbytes({"state": {0: entry}, "param_groups": groups}, "Lion")["state"]
    {0: {'exp_avg': tensor([0.0000, 1.0039, 2.0000])}}
    """
    states, groups = _parts(state_dict, "bitsandbytes")
    entries = {key: _flat(entry, f"state of parameter {key}") for key, entry in states.items()}
    name = _target(optimizer, entries)
    translated = [_group(group, name, f"param group {i}") for i, group in enumerate(groups)]
    decoded = {key: _entry(entry, name, f"state of parameter {key}") for key, entry in entries.items()}
    return {"state": decoded, "param_groups": translated}


def from_torchao(state_dict: StateDict) -> dict[str, Any]:
    r"""Decode the state_dict of an optimizer of torchao, 8 bits, 4 bits or fp8, into one of torch.optim.

    .. math:: x_i = \mathrm{qmap}[c_i] \cdot \mathrm{scale}[\lfloor i / b \rfloor]

    with i the row-major index of an element, c its code and b the elements for each scale. Codes of 4 bits
    are two in a byte, the first in its upper half; codes of fp8 are E4M3 numbers and have no map. All states
    become fp32, DTensors stay DTensors, learning rates become numbers.

    Args:
        state_dict: what `state_dict()` of Adam8bit, AdamW4bit, AdamWFp8 and their like returned.

    Returns:
        The dict that `load_state_dict` of Adam or AdamW takes, in torch.optim or fusedcalib; whether weight
        decay is decoupled is that class's. Tensors that were fp32 are shared with the argument.

    Raises:
        ValueError: something in the dict is not known, with the place where it stands.

    Source: Dettmers et al. 2022, section 2; Li et al., "Memory Efficient Optimizers with 4-bit States",
    NeurIPS 2023; attributes as the tensor classes of torchao.optim 0.19 have them.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> from fusedcalib.checkpoints import from_torchao
    >>> codes = torch.tensor([[1.0, -0.5]]).to(torch.float8_e4m3fn)
    >>> state = SimpleNamespace(codes=codes, scale=torch.tensor([2.0]), shape=codes.shape)
    >>> from_torchao({"state": {0: {"exp_avg": state}}, "param_groups": []})["state"]
    {0: {'exp_avg': tensor([[ 2., -1.]])}}
    """
    states, groups = _parts(state_dict, "torchao")
    decoded = {
        key: {
            name: _step(value) if name == "step" else _torchao(value, f"{name} of parameter {key}")
            for name, value in entry.items()
        }
        for key, entry in states.items()
    }
    for group in groups:
        if isinstance(group.get("lr"), Tensor):
            group["lr"] = group["lr"].item()
    return {"state": decoded, "param_groups": groups}


def _parts(state_dict: StateDict, library: str) -> tuple[StateDict, list[dict[str, Any]]]:
    """State and copies of the groups, of what is a state_dict of one optimizer."""
    keys = list(state_dict) if isinstance(state_dict, Mapping) else []
    if not {"state", "param_groups"} <= set(keys):
        raise ValueError(
            f"a {type(state_dict).__name__} with {', '.join(map(repr, keys)) or 'no keys'} is not the "
            f"state_dict of one optimizer of {library}, which has 'state' and 'param_groups'"
        )
    return state_dict["state"], [dict(group) for group in state_dict["param_groups"]]


def _step(value: Any) -> Tensor:
    """A count of steps as torch.optim keeps it."""
    return torch.tensor(float(value), dtype=torch.float32)


def _plain(value: Any, where: str) -> Tensor:
    """A state that is not compressed, fp32."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{where} is {kind}, neither a floating-point tensor nor codes with their scales")
    return value.detach().float()


# -- bitsandbytes -----------------------------------------------------------------------------


def _flat(entry: StateDict, where: str) -> dict[str, Any]:
    """All that is kept for a parameter, in one dict, each key of it known."""
    flat = {key: value for key, value in entry.items() if key != NESTED} | dict(entry.get(NESTED, {}))
    if unknown := sorted(map(str, flat.keys() - KNOWN)):
        raise ValueError(f"{where}: bitsandbytes, whose states are state1 and state2, has no {unknown}")
    if "state1" not in flat:
        raise ValueError(f"{where}: there is no state1")
    return flat


def _target(optimizer: str | None, entries: Mapping[Any, StateDict]) -> str:
    """The class whose names the states are to have."""
    if optimizer is None:
        if all("state2" in entry for entry in entries.values()):
            return "AdamW"
        raise ValueError(
            "parameters have one state, and the dict does not say of which optimizer: name it, one of "
            f"{', '.join(ONE_STATE)}"
        )
    if optimizer not in STATES:
        raise ValueError(f"optimizer must be one of {', '.join(STATES)} or None, not {optimizer!r}")
    return optimizer


def _entry(entry: StateDict, name: str, where: str) -> dict[str, Any]:
    """The state of a parameter as the class of that name keeps it."""
    names = STATES[name]
    if ("state2" in entry) != (len(names) == 2):
        found = "state1 and state2" if "state2" in entry else "state1 alone"
        raise ValueError(f"{where}: {found} cannot be of {name}, which has {' and '.join(names)}")
    states = {state: _bitsandbytes(entry, i, where) for i, state in enumerate(names, start=1)}
    if len(shapes := {tuple(x.shape) for x in states.values()}) > 1:
        raise ValueError(f"{where}: state1 and state2 have shapes {sorted(shapes)}, not the same")
    return states if name in UNCOUNTED else {"step": _step(entry.get("step", 0)), **states}


def _bitsandbytes(entry: StateDict, i: int, where: str) -> Tensor:
    """A state of a parameter, the first or the second: fp32."""
    codes, where = entry[f"state{i}"], f"{where}: state{i}"
    if isinstance(codes, Tensor) and not codes.is_contiguous():
        raise ValueError(
            f"{where} is not contiguous, and which elements it belongs to depends on the version of "
            "bitsandbytes and its device: bring it into the order of the parameter's elements first"
        )
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
        return _plain(codes, where)
    values = _mapped(codes.flatten(), entry.get(f"qmap{i}"), 256, f"{where} has codes and qmap{i}")
    if f"absmax{i}" in entry:
        return _by_blocks(values, entry[f"absmax{i}"].float(), where).reshape(codes.shape)
    if f"max{i}" in entry:
        whole: Tensor = entry[f"max{i}"].float()
        return (values * whole).reshape(codes.shape)
    raise ValueError(f"{where} has codes, but neither absmax{i} nor max{i} to scale them")


def _mapped(codes: Tensor, qmap: Tensor | None, entries: int, where: str) -> Tensor:
    """What codes stand for: fp32."""
    if qmap is None or qmap.numel() != entries:
        raise ValueError(f"{where} has {0 if qmap is None else qmap.numel()} entries, not {entries}")
    return qmap.to(codes.device).float()[codes.long()]


def _by_blocks(values: Tensor, scales: Tensor, where: str) -> Tensor:
    """Values times the scale of their block, the last of which may be shorter."""
    fitting = [block for block in BLOCKS if scales.numel() == -(-values.numel() // block)]
    if not fitting:
        raise ValueError(
            f"{where} has {scales.numel()} scales for {values.numel()} elements, which is neither one for "
            "each 256 nor, as before 0.44, one for each 2048"
        )
    return values * scales.flatten().repeat_interleave(fitting[0])[: values.numel()]


def _momentum(betas: Any) -> dict[str, Any]:
    return {"momentum": betas[0], "dampening": 0.0, "nesterov": False}


def _alpha(betas: Any) -> dict[str, Any]:
    return {"alpha": betas[0], "momentum": 0.0, "centered": False}


def _adam(betas: Any) -> dict[str, Any]:
    return {"betas": tuple(betas[:2]), "amsgrad": False, "decoupled_weight_decay": True}


# What becomes of `betas`, which all optimizers of bitsandbytes have.
OPTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Adam": _adam,
    "AdamW": _adam,
    "Lion": lambda betas: {"betas": tuple(betas[:2]), "maximize": False, "foreach": None},
    "SGD": _momentum,
    "RMSprop": _alpha,
    "Adagrad": lambda _: {"lr_decay": 0.0, "initial_accumulator_value": 0.0},
}


def _group(group: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """The options of a group as the class of that name has them; those it does not know stay."""
    if "betas" not in group:
        raise ValueError(f"{where} has no betas, as all optimizers of bitsandbytes do")
    if len(group["betas"]) > 2:
        raise ValueError(f"{where} has three betas: it is of AdEMAMix, and torch.optim has nothing like it")
    dropped = {"betas", "alpha", "t_alpha", "t_beta3"} | ({"eps"} if name in UNCOUNTED else set())
    kept = {key: value for key, value in group.items() if key not in dropped}
    return kept | OPTIONS[name](group["betas"])


# -- torchao ----------------------------------------------------------------------------------


def _torchao(value: Any, where: str) -> Any:
    """A state of a parameter: fp32, or a DTensor of it."""
    if hasattr(value, "to_local"):
        local = _torchao(value.to_local(), where)
        layout = {"run_check": False, "shape": value.shape, "stride": value.stride()}
        return type(value).from_local(local, value.device_mesh, value.placements, **layout)
    if not hasattr(value, "codes") or not hasattr(value, "scale"):
        return _plain(value, where)
    codes, scale, qmap = value.codes.flatten(), value.scale.float(), getattr(value, "qmap", None)
    if codes.dtype == torch.float8_e4m3fn:
        shares = codes.float()
    elif qmap is not None and qmap.numel() == 16:
        shares = _mapped(torch.stack([codes >> 4, codes & 15], dim=1).flatten(), qmap, 16, where)
    else:
        shares = _mapped(codes, qmap, 256, f"{where} has codes of {codes.dtype}, and a map that")
    if shares.numel() != value.shape.numel() or not scale.numel() or shares.numel() % scale.numel():
        raise ValueError(
            f"{where} has {shares.numel()} codes and {scale.numel()} scales for shape {tuple(value.shape)}"
        )
    return (shares.reshape(scale.numel(), -1) * scale[:, None]).reshape(value.shape)
