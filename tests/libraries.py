"""Libraries that use optimizers; no test needs any of them."""

import importlib

import pytest


def library(name):
    """One that is not installed, or was made for another torch, is no failure of ours."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name}: {type(error).__name__}: {error}")
