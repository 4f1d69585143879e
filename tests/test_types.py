"""What type checkers, editors, command lines and configuration files see of the classes."""

import ast
import copy
import inspect
import json
import pickle
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from libraries import library
from rule_cases import RULES
from torch.optim.optimizer import ParamsT

import fusedcalib
from fusedcalib.nn import CSGD
from fusedcalib.options import SHARED

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {**fusedcalib.optimizers(), "CSGD": CSGD}
OF_SGD, OF_ADAMW = (set(inspect.signature(cls).parameters) for cls in (fusedcalib.SGD, fusedcalib.AdamW))
each_class = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)

# What a user writes, and behind it what a checker must say of it, if anything.
USED = """
import torch
import fusedcalib
from fusedcalib import AdamW
from fusedcalib.optimizer import ParamsT

params = [torch.zeros(2, 3, requires_grad=True)]
adamw = fusedcalib.AdamW(params, 1e-3, (0.9, 0.95), centralize=True, noise=fusedcalib.WeightNoise())
groups: list[dict[str, object]] = [{"params": params, "lr": torch.tensor(1e-3)}]
fused = AdamW([{"params": params, "lr": 0.1}], torch.tensor(1e-3), fused=True, state_dtype=torch.bfloat16)
as_torchs: torch.optim.AdamW = adamw
as_its_base: fusedcalib.Adam = adamw
calibrated: fusedcalib.SGD = fusedcalib.nn.CSGD(params)
with adamw.ema_weights():
    norm = adamw.grad_norm


class Mine(fusedcalib.ADOPT):
    def __init__(self, params: ParamsT, mine: float) -> None:
        super().__init__(params, lr=mine, clip_exponent=None, l1=0.5)


Mine(params, 0.1).step()
fusedcalib.AdamWW  # error
fusedcalib.AdamW(params, centralise=True)  # error
fusedcalib.AdamW(params, 1e-3, (0.9, 0.95), 1e-8, 0.0, False, True)  # error
fusedcalib.AdamW(params, centralize="rows")  # error
fusedcalib.AdamW(params, decoupled_weight_decay=True)  # error
fusedcalib.SGD(params, lr="0.1")  # error
fusedcalib.SGD(params, backend="cudnn")  # error
fusedcalib.Adan(params, betas=(0.9, 0.99))  # error
"""
WRONG = [number for number, line in enumerate(USED.split("\n"), start=1) if line.endswith("# error")]


def lines_of(command, tmp_path, read):
    """The lines in which a type checker finds an error, its cache and configuration being the project's."""
    (tmp_path / "used.py").write_text(USED)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = read(done.stdout)
    assert found is not None, done.stdout + done.stderr
    return sorted(set(found))


def test_mypy_knows_the_classes_and_their_arguments(tmp_path):
    library("mypy")

    def read(output):
        return [int(line) for line in re.findall(r"used\.py:(\d+): error", output)]

    assert lines_of([sys.executable, "-m", "mypy", tmp_path / "used.py"], tmp_path, read) == WRONG


def test_mypy_reads_the_rules_and_not_only_their_stubs():
    """It takes a stub for the file beside it, unless the file is named."""
    library("mypy")
    files = sorted((ROOT / "fusedcalib" / "rules").glob("*.py"))
    done = subprocess.run([sys.executable, "-m", "mypy", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_knows_the_classes_and_their_arguments(tmp_path):
    if shutil.which("pyright") is None:
        pytest.skip("pyright is not installed")
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))

    def read(output):
        if not output.lstrip().startswith("{"):
            pytest.skip("pyright cannot run")
        found = json.loads(output)["generalDiagnostics"]
        return [error["range"]["start"]["line"] + 1 for error in found if error["severity"] == "error"]

    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, "--project", tmp_path]
    assert lines_of(command, tmp_path, read) == WRONG


def static_names():
    """{name: module} of what __init__.py imports where a type checker reads it."""
    tree = ast.parse((ROOT / "fusedcalib" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and node.orelse == []][:1]
    assert all(alias.name == alias.asname for node in block.body for alias in node.names), "not handed on"
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_type_checkers_are_told_every_name():
    """A new file in rules/ needs a line in __init__.py, and `python docs/build.py`."""
    names = static_names()
    assert {*names, "__version__"} == set(fusedcalib.__all__)
    for name, cls in fusedcalib.optimizers().items():
        assert f"fusedcalib.{names[name]}" == cls.__module__
        assert Path(inspect.getfile(cls)).with_suffix(".pyi").exists()


@each_class
def test_the_constructor_has_the_signature_of_the_class(cls):
    signature = inspect.signature(cls)
    self, *taken = inspect.signature(cls.__init__).parameters.values()
    assert self.name == "self"
    assert taken == list(signature.parameters.values())
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in taken)
    assert cls.__init__.__doc__.startswith("Args:\n")
    types = typing.get_type_hints(cls.__init__)
    assert types.pop("return") is type(None)
    assert types == {p.name: p.annotation for p in taken}
    assert not any(isinstance(type_, str) for type_ in types.values())
    for option in SHARED:
        if option.name in types:
            assert f"    {option.name}: {option.doc[:20]}" in cls.__init__.__doc__
            assert option.name in inspect.getdoc(fusedcalib.FusedOptimizer)


def weights():
    return [torch.nn.Parameter(torch.ones(2, 3))]


class Bare(fusedcalib.FusedOptimizer, torch.optim.SGD):
    """As its author writes it."""

    rule = fusedcalib.SGD.rule


class Own(fusedcalib.AdamW):
    """With an argument of its own."""

    def __init__(self, params: ParamsT, warmup: int = 5, **options: typing.Any) -> None:
        super().__init__(params, **options)
        self.warmup = warmup


class Closed(fusedcalib.AdamW):
    """It hands nothing on."""

    def __init__(self, params: "Unknown", rate: float) -> None:  # noqa: F821
        super().__init__(params, lr=rate)


class Later(Own):
    """Of one that has a constructor."""


@pytest.mark.parametrize(
    ("cls", "given", "own", "others"),
    [
        (Bare, {"lr": 0.5}, ["lr", "momentum"], OF_SGD),
        (Own, {"lr": 0.5}, ["warmup", "lr"], OF_ADAMW),
        (
            Later,
            {"lr": 0.5, "l1": 0.1},
            ["warmup", "lr"],
            OF_ADAMW,
        ),
        (Closed, {"rate": 0.5}, ["rate"], {"params"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_users_class(cls, given, own, others):
    names = list(inspect.signature(cls).parameters)
    assert names[: 1 + len(own)] == ["params", *own]
    assert set(names) == {*own, *others}
    assert list(inspect.signature(cls.__init__).parameters)[1:] == names
    optimizer = cls(weights(), **given)
    assert optimizer.param_groups[0]["lr"] == 0.5
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(twin) is cls
        assert twin.param_groups[0]["lr"] == 0.5
        twin.step()
    with pytest.raises(TypeError, match="no_such_option"):
        cls(weights(), **given, no_such_option=1)


def test_classes_made_at_run_time_and_beside_others():
    """What stands before the optimizer in the order of bases is asked first, as without a constructor."""

    class Before:
        def __init__(self, *args, **options):
            self.asked = True
            super().__init__(*args, **options)

    mixed = type("Mixed", (Before, fusedcalib.SGD), {})
    assert mixed(weights(), 0.5).asked
    assert type("Again", (mixed,), {})(weights(), lr=0.5, l1=0.25).param_groups[0]["l1"] == 0.25


# -- command lines and configuration files --------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_jsonargparse_takes_every_option(name):
    """As Lightning's CLI asks for the arguments of an optimizer."""
    parser = library("jsonargparse").ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CLASSES[name], "it", skip={"params"}, instantiate=False)
    expected = {p.name: p.default for p in inspect.signature(CLASSES[name]).parameters.values()}
    assert vars(parser.get_defaults().it) == {k: v for k, v in expected.items() if k != "params"}
    found = parser.parse_args(["--it.lr=0.5", "--it.centralize=update", "--it.noise={'kind': 'weights'}"]).it
    assert (found.lr, found.centralize, found.noise) == (0.5, "update", {"kind": "weights"})
    optimizer = CLASSES[name](weights(), **vars(found))
    assert optimizer.param_groups[0]["noise"] == {"kind": "weights", "std": 1e-4}


@pytest.mark.parametrize("wrong", [{"centralise": True}, {"centralize": "rows"}, {"lr": "fast"}])
def test_jsonargparse_refuses_what_is_wrong(wrong):
    parser = library("jsonargparse").ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(torch.optim.Optimizer, "it", skip={"params"}, instantiate=False)
    good = {"class_path": "fusedcalib.AdamW", "init_args": {"lr": 0.5, "state_dtype": "bfloat16"}}
    assert parser.parse_object({"it": good}).it.init_args.lr == 0.5
    with pytest.raises(Exception, match=next(iter(wrong))):
        parser.parse_object({"it": {**good, "init_args": wrong}})


def test_hydra_makes_an_optimizer():
    utils = library("hydra.utils")
    config = {"_target_": "fusedcalib.AdamW", "_partial_": True, "lr": 0.5, "max_grad_norm": 1.0}
    optimizer = utils.instantiate(config)(weights())
    assert type(optimizer) is fusedcalib.AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["max_grad_norm"]) == (0.5, 1.0)
    with pytest.raises(Exception, match="centralise"):
        utils.instantiate({**config, "centralise": True})(weights())
