"""tests/run.py and the set-up behind it, as modules."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load_runner():
    """tests/run.py as a module; it reaches into sys.path, which the other tests must not see."""
    spec = importlib.util.spec_from_file_location("tests_run", ROOT / "tests" / "run.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


run = load_runner()
bootstrap = run.bootstrap
