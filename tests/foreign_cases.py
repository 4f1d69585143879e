"""Checkpoints of bitsandbytes and torchao by their published formulas, with the values they stand for."""

import copy
from typing import Any

import torch
from torch import Tensor

NESTED = "__bnb_optimizer_quant_state__"
# 4992 is a multiple of 128 and 5005 of nothing; what has less than 4096 elements is not compressed.
SHAPES = ((48, 104), (64, 64), (5, 1001), (48,))


def dynamic_map(signed: bool) -> Tensor:
    """Dettmers' dynamic tree: decades of growing resolution, middles of equal parts of [0.1, 1]; 0 and 1."""
    width = 7
    middles = []
    for decade in range(width):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        middles.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - width + 1))
    values = torch.cat(middles)
    return torch.cat([values, *([-values] if signed else []), torch.tensor([0.0, 1.0])]).sort().values.float()


def moments(shape: tuple[int, ...], signed: bool) -> Tensor:
    """States of a training: some scales in each block."""
    x = torch.randn(shape) * torch.exp(2 * torch.randn(shape)) * 1e-3
    return x if signed else x**2


def compress(x: Tensor, qmap: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Nearest codes of a flat tensor in blocks, and their largest magnitudes."""
    largest = torch.stack([part.abs().max() for part in x.flatten().split(block)])
    shares = torch.cat([part / part.abs().max() for part in x.flatten().split(block)])
    return (shares[:, None] - qmap).abs().argmin(dim=1).to(torch.uint8).reshape(x.shape), largest


def decompress(codes: Tensor, qmap: Tensor, scales: Tensor, block: int) -> Tensor:
    """One element after another: products of two fp32 numbers, exact in float64 and rounded once."""
    numbers, factors = qmap.tolist(), scales.tolist()
    values = [numbers[code] * factors[i // block] for i, code in enumerate(codes.flatten().tolist())]
    return torch.tensor(values, dtype=torch.float64).float().reshape(codes.shape)


# -- bitsandbytes -----------------------------------------------------------------------------

GROUP = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
GROUP |= {"alpha": 0.0, "t_alpha": None, "t_beta3": None, "initial_lr": 0.02}


def bitsandbytes_state(shape: tuple[int, ...], count: int, form: str) -> tuple[dict[str, Any], list[Tensor]]:
    """What is saved for a parameter, and what it stands for."""
    entry: dict[str, Any] = {"step": 3}
    values = []
    for i in range(1, count + 1):
        x = moments(shape, signed=i < count)
        if form == "32 bits" or x.numel() < 4096:
            entry[f"state{i}"] = x
            values.append(x)
            continue
        qmap = dynamic_map(signed=i == 1)
        block = {"before 0.44": 2048, "block_wise=False": x.numel()}.get(form, 256)
        codes, scales = compress(x, qmap, block)
        entry |= {f"state{i}": codes, f"qmap{i}": qmap}
        if form == "block_wise=False":
            entry |= {f"max{i}": scales, f"new_max{i}": torch.zeros(1)}
        else:
            entry[f"absmax{i}"] = scales
        values.append(decompress(codes, qmap, scales, block))
    if form == "since 0.49.2":
        entry = {"step": entry.pop("step"), "unorm_vec": torch.zeros(1), NESTED: entry}
    return entry, values


def bitsandbytes(count: int, form: str) -> tuple[dict[str, Any], list[list[Tensor]]]:
    saved = [bitsandbytes_state(shape, count, form) for shape in SHAPES]
    groups = [{**copy.deepcopy(GROUP), "params": list(range(len(saved)))}]
    return {"state": {i: entry for i, (entry, _) in enumerate(saved)}, "param_groups": groups}, [
        values for _, values in saved
    ]


FORMS = ("256", "before 0.44", "since 0.49.2", "block_wise=False", "32 bits")


# -- torchao ----------------------------------------------------------------------------------


class Stored(torch.Tensor):
    """Attributes and no values of its own, as torchao's classes; a DTensor is made of views."""

    @staticmethod
    def __new__(cls, shape: torch.Size, **attributes: Any) -> "Stored":
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16)

    def __init__(self, shape: torch.Size, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.view.default, torch.ops.aten.detach.default):
            return cls(args[0].shape, **args[0].__dict__)
        raise NotImplementedError(f"{func} of a compressed state")


def torchao_state(shape: tuple[int, ...], signed: bool, kind: str) -> tuple[Any, Tensor]:
    """A state as it is saved, and what it stands for."""
    x, block = moments(shape, signed), {"4bit": 128}.get(kind, 256)
    if x.numel() < 4096 or x.numel() % block:
        return x.bfloat16(), x.bfloat16().float()
    if kind == "fp8":
        scale = torch.stack([part.abs().max() / 448 for part in x.flatten().split(block)])
        codes = (x.reshape(-1, block) / scale[:, None]).to(torch.float8_e4m3fn)
        value = torch.cat([row.float() * scale[i] for i, row in enumerate(codes)]).reshape(shape)
        return Stored(x.shape, codes=codes.reshape(shape), scale=scale, block_size=block), value
    if kind == "8bit":
        qmap = dynamic_map(signed)
    else:
        qmap = torch.arange(-7, 9) / 8 if signed else torch.arange(1, 17) / 16
    codes, scale = compress(x, qmap, block)
    value = decompress(codes, qmap, scale, block)
    if kind == "4bit":
        codes = codes.flatten()[::2] * 16 + codes.flatten()[1::2]
    attributes = {"codes": codes, "scale": scale, "qmap": qmap, "signed": signed, "block_size": block}
    return Stored(x.shape, **attributes), value


def torchao(kind: str) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    saved, values = {}, []
    for i, shape in enumerate(SHAPES):
        m, v = torchao_state(shape, True, kind), torchao_state(shape, False, kind)
        saved[i] = {"step": torch.tensor(3.0), "exp_avg": m[0], "exp_avg_sq": v[0]}
        values.append({"exp_avg": m[1], "exp_avg_sq": v[1]})
    group = {
        "lr": torch.tensor(0.25),
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "amsgrad": False,
    }
    return {"state": saved, "param_groups": [{**group, "params": list(saved)}]}, values
