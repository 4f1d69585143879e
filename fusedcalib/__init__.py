"""Drop-in PyTorch optimizers whose whole step is one pass over memory.

>>> import torch, fusedcalib
>>> model = torch.nn.Linear(4, 2)
>>> opt = fusedcalib.AdamW(model.parameters(), lr=1e-3, centralize=True)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["SGD", "Adam", "AdamW", "__version__", "reference"]

if TYPE_CHECKING:
    from . import reference
    from .rules.adam import Adam, AdamW
    from .rules.sgd import SGD

_HOMES = {"SGD": ".rules.sgd", "Adam": ".rules.adam", "AdamW": ".rules.adam"}


def __getattr__(name: str) -> Any:
    """Loads an optimizer when it is first asked for: importing the package costs next to nothing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    if name == "reference":
        return import_module(".reference", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
