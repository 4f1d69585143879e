"""The registry of timm: what is added to it, and what it then makes. Also without timm, by a stand-in."""

import importlib
import sys

import pytest
import torch
from libraries import library

from fusedcalib.groups import param_groups
from fusedcalib.registry import optimizers, register_timm

NEEDED = r"needs timm 1\.0\.12 or newer: pip install"
STAND_IN = """
import dataclasses
@dataclasses.dataclass(frozen=True)
class OptimInfo:
    name: str
    opt_class: type
    description: str = ""
    has_eps: bool = True
    has_momentum: bool = False
    has_betas: bool = False
    num_betas: int = 2
    defaults: dict = None
class Registry:
    def __init__(self): self._optimizers = {}
    def register(self, info): assert self._optimizers.setdefault(info.name.lower(), info) is info
    def list_optimizers(self): return sorted(self._optimizers)
    def get_optimizer_info(self, name): return self._optimizers[name.lower()]
default_registry = Registry()
default_registry.register(OptimInfo("sgd", object, defaults={"nesterov": True}))
default_registry.register(OptimInfo("rmsprop", object, defaults={"alpha": 0.9, "unknown": 1}))
default_registry.register(OptimInfo("fusedadam", object))
"""


def timms():
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "timm"}


@pytest.fixture
def put(monkeypatch, tmp_path):
    """Puts a package named timm in the place of the one that may be installed."""
    kept = timms()

    def write(top="", factory=None):
        (tmp_path / "timm" / "optim").mkdir(parents=True)
        (tmp_path / "timm" / "__init__.py").write_text(top)
        (tmp_path / "timm" / "optim" / "__init__.py").touch()
        if factory is not None:
            (tmp_path / "timm" / "optim" / "_optim_factory.py").write_text(factory)
        monkeypatch.syspath_prepend(tmp_path)
        for name in kept:
            del sys.modules[name]

    yield write
    for name in timms():
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture(params=["stand-in", "timm"])
def registry(request, monkeypatch, put):
    if request.param == "stand-in":
        put(factory=STAND_IN)
    library("timm")
    registry = importlib.import_module("timm.optim._optim_factory").default_registry
    monkeypatch.setattr(registry, "_optimizers", dict(registry._optimizers))
    return registry


def test_timm_gets_every_class_once(registry, caplog):
    before = registry.list_optimizers()
    names = register_timm()
    assert names == [f"fused-{name.lower()}" for name in optimizers()]
    assert register_timm() == names
    assert not caplog.records  # timm warns of a name registered again
    assert registry.list_optimizers() == sorted([*before, *names])
    infos = {name: registry.get_optimizer_info(name) for name in names}
    assert [info.opt_class for info in infos.values()] == list(optimizers().values())
    sgd, adan, rmsprop = (infos[f"fused-{name}"] for name in ("sgd", "adan", "rmsprop"))
    assert (sgd.has_eps, sgd.has_momentum, sgd.has_betas, sgd.defaults) == (
        False,
        True,
        False,
        {"nesterov": True},
    )
    assert (adan.has_eps, adan.has_momentum, adan.has_betas, adan.num_betas) == (True, False, True, 3)
    assert rmsprop.defaults == {"alpha": 0.9}
    assert "mine-adamw" in register_timm("Mine-")


@pytest.mark.parametrize("prefix", ["fused", "fused_", ""])
def test_timm_keeps_its_own_names(registry, prefix):
    before = dict(registry._optimizers)
    with pytest.raises(ValueError, match=f"prefix '{prefix}': timm (has another|takes what follows)"):
        register_timm(prefix)
    assert registry._optimizers == before


@pytest.mark.parametrize(
    ("top", "factory", "said"),
    [
        ("", None, NEEDED),
        ("import timm.layers", None, NEEDED),
        ("import no_torchvision", "", "No module named 'no_torchvision'"),
    ],
)
def test_a_timm_that_cannot_be_used(put, top, factory, said):
    put(top, factory)
    with pytest.raises(ImportError, match=said):
        register_timm()


def test_no_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=NEEDED):
        register_timm()


# What the real timm makes of them


def trained(registry, name, **options):
    """A small network after five steps, in fp64, and its optimizer."""
    torch.manual_seed(0)
    layers = (
        torch.nn.Conv2d(3, 4, 3, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(144, 3),
    )
    model = torch.nn.Sequential(*layers).double()
    optimizer = registry.create_optimizer(model, name, **{"lr": 0.01, "weight_decay": 0.1, **options})
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(6, 3, 8, 8, dtype=torch.float64)).pow(2).mean().backward()
        optimizer.step()
    return model, optimizer


# Whose defaults are not the paper's.
THEIR_OWN = {
    "adopt": {"clip_exp": 0.25},
    "adabelief": {"decoupled_decay": False, "rectify": False},
    "lamb": {"max_grad_norm": None},
}
# timm's LaProp decays after the step, and corrects its second moment by an fp32 number: five roundings of
# 2^-24 in each of five steps, which are up to 2 lr long.
BOTH = {"laprop": {"weight_decay": 0.0}}
AWAY = {"laprop": 5 * 5 * 2 * 0.01 * 2**-24}


@pytest.mark.parametrize("registry", ["timm"], indirect=True)
@pytest.mark.parametrize("cls", optimizers().values(), ids=lambda cls: cls.__name__)
def test_a_fused_name_trains_as_timms_name(registry, cls):
    name = cls.__name__.lower()
    register_timm()
    ours, optimizer = trained(registry, f"fused-{name}")
    assert type(optimizer) is cls
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]
    if name in registry.list_optimizers():
        both = BOTH.get(name, {})
        ours, _ = trained(registry, f"fused-{name}", **both)
        theirs, other = trained(registry, name, **THEIR_OWN.get(name, {}), **both)
        assert not isinstance(other, cls)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=AWAY.get(name, 1e-12))
    trained(registry, f"lookahead_fused-{name}", layer_decay=0.5, centralize=True, foreach=True)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnextv2_atto"])
def test_param_groups_decay_what_timm_decays(name):
    timm, optim = library("timm"), library("timm.optim")
    with torch.device("meta"):
        model = timm.create_model(name)
    no_decay = getattr(model, "no_weight_decay", set)()
    theirs = optim.param_groups_weight_decay(model, 0.1, no_weight_decay_list=no_decay)
    ours = param_groups(model, 0.1)
    decayed = [{p for g in theirs if g["weight_decay"] for p in g["params"]}]
    decayed += [{p for g in ours if g["weight_decay"] for _, p in g["params"]}]
    assert decayed[0] == decayed[1]
    assert sum(len(g["params"]) for g in ours) == len(list(model.parameters()))
