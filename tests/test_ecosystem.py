"""The package as a whole: what it imports, what it installs, and who inside it may know whom."""

import ast
import doctest
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from rule_cases import RULES

import fusedcalib
from fusedcalib.executors import choose
from fusedcalib.reference import ORACLES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fusedcalib"
PUBLIC = {name: getattr(fusedcalib, name) for name in fusedcalib.__all__}
CLASSES = fusedcalib.optimizers()
LAYERS = [getattr(fusedcalib.nn, name) for name in fusedcalib.nn.__all__]
EXPLAINED = [fusedcalib, fusedcalib.nn, *filter(callable, PUBLIC.values()), *LAYERS]


def python(code, *args, cwd=ROOT):
    """What a fresh interpreter prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = {"triton", "numba", "matplotlib", "sklearn", "scipy"}


def test_import_is_light(tmp_path):
    """Nothing heavy is loaded, and beyond torch it takes no time a user would notice."""
    code = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import fusedcalib
print(time.process_time() - start, *sorted({m.split(".")[0] for m in set(sys.modules) - before}))
"""
    seconds, *loaded = python(code, cwd=tmp_path).split()
    assert not HEAVY & set(loaded)
    assert float(seconds) < 0.25


LACKING = """
import sys
from importlib.machinery import PathFinder
class Lacking(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = name.split(".")[0] not in sys.argv[1].split("+")
        return super().find_spec(name, path, target) if found else None
sys.meta_path[sys.meta_path.index(PathFinder)] = Lacking
import torch, fusedcalib
p = torch.nn.Parameter(torch.ones(2, 3))
p.grad = torch.ones(2, 3)
optimizer = fusedcalib.AdamW([p], lr=0.5, weight_decay=0)
optimizer.step()
assert torch.allclose(p.detach(), torch.full((2, 3), 0.5)), p
print(optimizer.backend, optimizer.backend in repr(optimizer))
try:
    fusedcalib.AdamW([p], backend=sys.argv[1].split("+")[-1]).step()
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("missing", ["triton", "numba", pytest.param("triton+numba", marks=pytest.mark.slow)])
def test_works_without(missing, tmp_path):
    """What is not installed is not needed, unless asked for by name; the path taken is told."""
    path, refusal = python(LACKING, missing, cwd=tmp_path).split("\n", 1)
    expected = "eager" if "numba" in missing or not has("numba") else "numba"
    assert path == f"{expected} True"
    assert re.search(rf"\b{missing.split('+')[-1]}\b", refusal)


def has(module):
    return bool(python(f"import importlib.util as u; print(u.find_spec({module!r}) or '')"))


def test_links_lead_to_the_sources():
    for name in ("kernels", "bench"):
        link = PACKAGE / name
        assert link.is_symlink(), f"{link} is a copy"
        assert os.readlink(link) == f"../{name}"
        assert link.resolve() == ROOT / name


def test_kernels_shadows_nobody():
    """A regular package of that name at the root would hide the Hugging Face package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    assert python(code) == "None"


def imports(path):
    """(name, line) of every absolute module that a file of the package imports, at any depth."""
    inside = ("fusedcalib", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names)


FOLDERS = ("", "*/", "executors/*/", "bench/*/")

SOURCES = sorted(
    {p for folder in FOLDERS for p in PACKAGE.glob(f"{folder}*.py")} - {*PACKAGE.glob("bench/speed/*")}
)
INSTALLED = [path for path in SOURCES if not path.is_relative_to(PACKAGE / "bench" / "repository")]


# Who may import whom: each line those below it. A folder is one name, so that a new file needs no entry.
ORDER = """
__main__
bench
__init__
nn registry release clip
rules matrices
optimizer groups limits
masters norms statistics
engine members
executors
layout
signature
options rule
noise option storage ranges
hostmath checkpoints
kernels
"""
FLOOR = {name: number for number, line in enumerate(ORDER.split("\n")) for name in line.split()}
# The same of the folders of bench, and the files directly in it.
BENCH = """
cli run
repository
predict
measure
report
env
models bootstrap
"""
BENCH_FLOOR = {name: number for number, line in enumerate(BENCH.split("\n")) for name in line.split()}
USERS = {"__main__", "bench", "__init__"}  # the public names are theirs, and the oracles too


def part_of(path):
    """The folder of the package, or the file directly in it, that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_lead_downwards(path):
    own = part_of(path)
    assert own in FLOOR or own == "reference"
    allowed = {own} | {name for name in FLOOR if FLOOR[name] > FLOOR.get(own, len(FLOOR))}
    if own in USERS:
        allowed |= {"reference", "", *fusedcalib.__all__}
    names = [(f"{name}.".split("."), line) for name, line in imports(path)]
    known = [(name[1], line) for name, line in names if name[0] == "fusedcalib"]
    assert [(name, line) for name, line in known if name not in allowed] == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench").glob("*/*.py")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_imports_within_bench_lead_downwards(path):
    own = path.parent.name
    if own == "speed":
        pytest.skip("a test")
    allowed = {own} | {name for name in BENCH_FLOOR if BENCH_FLOOR[name] > BENCH_FLOOR[own]}
    within = [
        (name.split(".")[2], line)
        for name, line in imports(PACKAGE / path.relative_to(ROOT))
        if name.startswith("fusedcalib.bench.")
    ]
    assert [(name, line) for name, line in within if name not in allowed] == []


def module_of(name):
    """The file of the package that an imported name comes from, without its suffix; None for others."""
    parts = name.split(".")[1:] if name.startswith("fusedcalib.") else []
    while parts:
        path = PACKAGE.joinpath(*parts)
        if path.with_suffix(".py").exists():
            return path
        if (path / "__init__.py").exists() and path.name not in ("nn", "reference", "rules"):
            return None  # a folder, whose own file holds nothing but a docstring
        parts.pop()
    return None


def test_no_circle_of_imports():
    """Files that import each other, directly or around, cannot be read one after the other."""
    left = {
        path.with_suffix(""): {m for name, _ in imports(path) if (m := module_of(name)) is not None}
        for path in SOURCES
        if path.name != "__init__.py"
    }
    while free := {path for path, used in left.items() if not used & left.keys() - {path}}:
        left = {path: used for path, used in left.items() if path not in free}
    assert {str(path.relative_to(PACKAGE)) for path in left} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("**/*.py")), ids=lambda p: p.name)
def test_kernels_stand_alone(path):
    """Relative imports within the folder and third-party modules: publishable as it stands."""
    tree = ast.parse(path.read_text())
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert all(node.level <= 1 for node in froms)
    absolute = [node.module for node in froms if not node.level]
    absolute += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    own = {"fusedcalib", "kernels", "bench", "tests"}
    assert not own & {name.split(".")[0] for name in absolute}


def test_every_rule_has_an_oracle():
    """A rule that only its own kernel defines cannot be found wrong."""
    assert set(CLASSES) == set(RULES) <= set(ORACLES)
    files = [p.stem for p in (PACKAGE / "rules").glob("*.py") if p.stem != "__init__"]
    modules = [importlib.import_module(f"fusedcalib.rules.{name}") for name in files]
    rules = {c for m in modules for c in vars(m).values() if isinstance(c, type)}
    assert set(CLASSES.values()) == {c for c in rules if c.__module__.startswith("fusedcalib.rules.")}


def test_public_names():
    """All that is public can be imported by name and with a star, and is found by completion."""
    others = {"FusedOptimizer", "create", "optimizers", "param_groups", "register_timm"}
    others |= {"enable_gradient_release", "clip_grad_norm_", "get_total_norm", "nonfinite_gradients"}
    others |= {"AdaGC", "EMAClip", "ZClip", "Muon", "muon_groups"}
    others |= {"GradientNoise", "LangevinNoise", "WeightNoise", "checkpoints", "nn", "reference"}
    assert set(fusedcalib.__all__) == {*CLASSES, *others, "__version__"}
    assert set(fusedcalib.__all__) <= set(dir(fusedcalib))
    assert {name: PUBLIC[name] for name in CLASSES} == CLASSES
    namespace = {}
    exec("from fusedcalib import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(fusedcalib.__all__)
    with pytest.raises(AttributeError, match="SGDX"):
        fusedcalib.SGDX  # noqa: B018


@pytest.mark.parametrize(
    "cls", [c for n, c in CLASSES.items() if RULES[n].in_torch], ids=lambda c: c.__name__
)
def test_signature_begins_with_torchs(cls):
    def shape(signature):
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    theirs = shape(inspect.signature(getattr(torch.optim, cls.__name__)))
    mine = shape(inspect.signature(cls))
    assert mine[: len(theirs)] == theirs


@pytest.fixture
def no_loops(monkeypatch):
    """Each rule's loop takes a second to compile, and has tests of its own."""
    monkeypatch.setattr("fusedcalib.executors.numba.why_not", lambda *asked: "is not wanted")
    choose.choose.cache_clear()
    yield
    choose.choose.cache_clear()


@pytest.mark.parametrize("thing", EXPLAINED, ids=lambda t: t.__name__)
def test_docstring_examples(thing, no_loops):
    (test,) = doctest.DocTestFinder(recurse=False).find(thing)
    assert test.examples, "what is public shows how it is used"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.DocTestRunner(optionflags=flags).run(test).failed == 0


def test_readme_examples(tmp_path, monkeypatch):
    """Every ```python block runs, in the order they stand, in one namespace."""
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md")
    text = readme.read_text()
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(readme), "exec"), namespace)


def test_wheel_contents(tmp_path):
    """One top-level name; every module, the kernels, the stubs and the type marker inside it."""
    pytest.importorskip("setuptools", "77")
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "results")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    (source / "README.md").touch()
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fusedcalib"}
    stubs = {str(path.relative_to(ROOT)) for path in PACKAGE.glob("rules/*.pyi")}
    wanted = {str(path.relative_to(ROOT)) for path in INSTALLED} | stubs | {"fusedcalib/py.typed"}
    assert wanted <= names
    assert not [name for name in names if re.search("repository|speed|examples", name)]


def test_packages_are_all_listed():
    """A new folder of the package that pyproject.toml does not name would not be installed."""
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in INSTALLED}
    assert set(listed) == found
