"""Flat shards, as FSDP1 and DeepSpeed ZeRO make them, have no rows: centring says so, once."""

import warnings

import pytest
import torch

import fusedcalib


def stepped(params, times=3, **options):
    optimizer = fusedcalib.SGD(params, lr=0.1, backend="eager", **options)
    for _ in range(times):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


def vectors():
    return [torch.nn.Parameter(torch.zeros(6)), torch.nn.Parameter(torch.zeros(4))]


@pytest.mark.parametrize("options", [{"centralize": True}, {"max_row_norm": 1.0}], ids=str)
def test_flat_parameters_are_told_of_once(options):
    with pytest.warns(UserWarning, match="2 parameters of 10 elements are vectors without rows") as told:
        stepped(vectors(), **options)
    assert len(told) == 1


def test_marked_ones_are_found_among_others():
    for mark in ("_is_flat_param", "ds_id"):
        flat = torch.nn.Parameter(torch.zeros(5))
        setattr(flat, mark, True)
        with pytest.warns(UserWarning, match="1 parameters of 5 elements"):
            stepped([flat, torch.nn.Parameter(torch.zeros(2, 2))], centralize=True)


def test_nothing_is_said_of_others():
    """Biases beside matrices, and vectors that nobody asked to centre."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped([*vectors(), torch.nn.Parameter(torch.zeros(2, 2))], centralize=True)
        stepped(vectors())
