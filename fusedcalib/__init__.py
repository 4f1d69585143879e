"""Drop-in PyTorch optimizers whose whole step is one pass over memory.

>>> import torch, fusedcalib
>>> model = torch.nn.Linear(4, 2)
>>> opt = fusedcalib.AdamW(model.parameters(), lr=1e-3, centralize=True)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # at run time a file in rules/ is all that an optimizer takes, see __getattr__
    from . import checkpoints as checkpoints
    from . import nn as nn
    from . import reference as reference
    from .clip import clip_grad_norm_ as clip_grad_norm_
    from .clip import get_total_norm as get_total_norm
    from .clip import nonfinite_gradients as nonfinite_gradients
    from .groups import muon_groups as muon_groups
    from .groups import param_groups as param_groups
    from .limits import AdaGC as AdaGC
    from .limits import EMAClip as EMAClip
    from .limits import ZClip as ZClip
    from .matrices.muon import Muon as Muon
    from .noise import GradientNoise as GradientNoise
    from .noise import LangevinNoise as LangevinNoise
    from .noise import WeightNoise as WeightNoise
    from .optimizer import FusedOptimizer as FusedOptimizer
    from .registry import create as create
    from .registry import optimizers as optimizers
    from .registry import register_timm as register_timm
    from .release import enable_gradient_release as enable_gradient_release
    from .rules.adabelief import AdaBelief as AdaBelief
    from .rules.adadelta import Adadelta as Adadelta
    from .rules.adagrad import Adagrad as Adagrad
    from .rules.adam import Adam as Adam
    from .rules.adam import AdamW as AdamW
    from .rules.adam_mini import AdamMini as AdamMini
    from .rules.adamax import Adamax as Adamax
    from .rules.adan import Adan as Adan
    from .rules.ademamix import AdEMAMix as AdEMAMix
    from .rules.adopt import ADOPT as ADOPT
    from .rules.lamb import LAMB as LAMB
    from .rules.laprop import LaProp as LaProp
    from .rules.lars import LARS as LARS
    from .rules.lion import Lion as Lion
    from .rules.nadam import NAdam as NAdam
    from .rules.radam import RAdam as RAdam
    from .rules.rmsprop import RMSprop as RMSprop
    from .rules.sgd import SGD as SGD
    from .rules.sgd import SGDW as SGDW
    from .rules.signum import Signum as Signum
    from .rules.stableadamw import StableAdamW as StableAdamW

_HOMES = {
    "AdaGC": ".limits",
    "EMAClip": ".limits",
    "FusedOptimizer": ".optimizer",
    "GradientNoise": ".noise",
    "LangevinNoise": ".noise",
    "Muon": ".matrices.muon",
    "WeightNoise": ".noise",
    "ZClip": ".limits",
    "clip_grad_norm_": ".clip",
    "create": ".registry",
    "enable_gradient_release": ".release",
    "get_total_norm": ".clip",
    "muon_groups": ".groups",
    "nonfinite_gradients": ".clip",
    "optimizers": ".registry",
    "param_groups": ".groups",
    "register_timm": ".registry",
}
_MODULES = ("checkpoints", "nn", "reference")


def _loaded(name: str) -> Any:
    """Loads what is asked for, optimizers from `rules`: importing the package costs next to nothing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name == "__all__":
        return sorted([*_found(), *_HOMES, *_MODULES, "__version__"])
    if name[:1].isupper() and name in _found():
        return _found()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:  # or every name would be one, of any type
    __getattr__ = _loaded


def __dir__() -> list[str]:
    return sorted({*globals(), *_loaded("__all__")})


def _found() -> dict[str, Any]:
    classes: dict[str, Any] = import_module(".registry", __name__).optimizers()
    return classes
