"""What tells compiled loops apart on disk: every part of a kind, the compiler's settings, a rule's source."""

import linecache
import os

import pytest
import torch

import fusedcalib
from fusedcalib.rules.adam import adam

numba = pytest.importorskip("numba")

from fusedcalib.executors.numba import cache  # noqa: E402
from fusedcalib.layout.recipe import recipe_of  # noqa: E402


def recipe(opt=fusedcalib.AdamW, **options):
    group = opt([torch.nn.Parameter(torch.zeros(2, 2))], **options).param_groups[0]
    return recipe_of(opt.rule, group)


KIND = (recipe(), (torch.float32,) * 4, torch.float32, 15, 0, False, "step", ())
KINDS = [KIND, (None, *KIND[1:])]
KINDS += [(recipe(fusedcalib.Adam), *KIND[1:]), (recipe(fusedcalib.NAdam), *KIND[1:])]
KINDS += [(recipe(**options), *KIND[1:]) for options in ({"amsgrad": True}, {"maximize": True}, {"l1": 0.1})]
KINDS += [(recipe(**options), *KIND[1:]) for options in ({"centralize": True}, {"max_row_norm": 1.0})]
KINDS += [(recipe(state_dtype="8bit"), *KIND[1:]), (recipe(master_weights="split16"), *KIND[1:])]
KINDS += [(KIND[0], (torch.bfloat16, *KIND[1][1:]), *KIND[2:]), (*KIND[:2], torch.float64, *KIND[3:])]
KINDS += [(*KIND[:i], other, *KIND[i + 1 :]) for i, other in [(3, 16), (4, 2), (5, True), (6, "partial")]]
KINDS += [(*KIND[:7], ("split16", "cast", "cast", "cast"))]


def test_every_part_of_a_kind_counts():
    assert len({cache.key_of("kernel_for", kind) for kind in KINDS}) == len(KINDS)
    assert cache.key_of("loop_for", KIND) != cache.key_of("kernel_for", KIND)
    again = recipe()
    assert again.rule is KIND[0].rule
    assert cache.key_of("kernel_for", (again, *KIND[1:])) == cache.key_of("kernel_for", KIND)


@pytest.mark.parametrize("setting", ["OPT", "LOOP_VECTORIZE", "CPU_NAME", "BOUNDSCHECK"])
def test_settings_of_the_compiler_count(setting, monkeypatch):
    before = cache._compiler.__wrapped__()
    monkeypatch.setattr(numba.config, setting, "another")
    assert cache._compiler.__wrapped__() != before
    monkeypatch.undo()
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 7)
    assert cache._compiler.__wrapped__() == before


RULE = """
def helper(x):
    return x + SHARE

def update(p, g, state, h, VARIANT):
    return helper(g), ()
"""


def defined(text, name="a cell of a notebook", **names):
    """The function `update` of a text that no file has, as notebooks have it."""
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec"), names)
    return names["update"]


def test_a_rule_counts_with_all_that_it_uses():
    texts = [RULE, RULE.replace("x +", "x -"), RULE.replace("helper(g)", "helper(p)")]
    found = [[*cache._sources(defined(text, SHARE=share))] for text in texts for share in (0.25, 0.5)]
    assert len({*map(tuple, found)}) == 6
    assert found[0] == [*cache._sources(defined(RULE, SHARE=0.25))]
    assert any("beta1" in text for text in cache._sources(adam))


def closed(share):
    def update(p, g, state, h, VARIANT):
        return share * g, ()

    return update


@pytest.mark.parametrize(
    "function",
    [closed(1.0), defined(RULE, SHARE=object()), defined(RULE, SHARE=[1.0]), defined(RULE, SHARE=os)],
    ids=["closure", "object", "list", "module"],
)
def test_a_rule_whose_parts_are_not_known_is_not_kept(function):
    with pytest.raises(TypeError):
        [*cache._sources(function)]
