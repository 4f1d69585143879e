"""What is not known in a checkpoint of bitsandbytes or torchao is told, with the place where it stands."""

from typing import Any

import pytest
import torch
from foreign_cases import GROUP, Stored, bitsandbytes, bitsandbytes_state

from fusedcalib.checkpoints import from_bitsandbytes, from_torchao


def bitsandbytes_with(**changes: Any) -> dict[str, Any]:
    """One parameter with two states of 4096 elements, and something else about them; None leaves it out."""
    entry = bitsandbytes_state((64, 64), 2, "256")[0] | changes
    state = {"weight": {key: value for key, value in entry.items() if value is not None}}
    return {"state": state, "param_groups": [{**GROUP, "params": ["weight"]}]}


CODES = torch.zeros(64, 64, dtype=torch.uint8)
UNKNOWN = [
    ({"exp_avg": CODES}, r"parameter weight: .*has no \['exp_avg'\]"),
    ({"state1": None}, "parameter weight: there is no state1"),
    ({"state2": CODES.long()}, "parameter weight: state2 is a tensor of torch.int64"),
    ({"state2": 1.0}, "weight: state2"),
    ({"state1": torch.zeros(2, 64, 64)}, "parameter weight: state1 and state2 have shapes"),
    ({"state1": CODES.t()[:, :]}, "state1 is not contiguous"),
    ({"qmap2": None}, "weight: state2 has codes and qmap2 has 0 entries, not 256"),
    ({"qmap1": torch.zeros(16)}, "weight: state1 has codes and qmap1 has 16 entries"),
    ({"absmax1": None}, "weight: state1 has codes, but neither absmax1 nor max1"),
    ({"absmax2": torch.ones(15)}, "weight: state2 has 15 scales for 4096 elements"),
]


@pytest.mark.parametrize(("changes", "message"), UNKNOWN, ids=[message for _, message in UNKNOWN])
def test_what_bitsandbytes_does_not_save_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes(bitsandbytes_with(**changes))


def test_the_optimizer_has_to_be_named_where_the_dict_cannot_tell() -> None:
    one, two = bitsandbytes(1, "256")[0], bitsandbytes(2, "256")[0]
    for given, name, message in (
        (one, None, "one state.*Lion, SGD, RMSprop, Adagrad"),
        (one, "AdamW", "parameter 0: state1 alone cannot be of AdamW, which has exp_avg and exp_avg_sq"),
        (two, "Lion", "parameter 0: state1 and state2 cannot be of Lion, which has exp_avg"),
        (two, "Adamw", "one of Adam, AdamW, .*'Adamw'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_bitsandbytes(given, name)


def test_groups_that_are_not_of_an_optimizer_known_are_told() -> None:
    for options, message in (({}, "no betas"), ({"betas": (0.9, 0.99, 0.999)}, "three betas.*AdEMAMix")):
        groups = [{"lr": 0.1, "params": []}, {"lr": 0.1, "betas": (0.9, 0.99), "params": []}]
        groups[0] |= options
        with pytest.raises(ValueError, match=f"param group 0 has {message}"):
            from_bitsandbytes({"state": {}, "param_groups": groups})


@pytest.mark.parametrize("decode", [from_bitsandbytes, from_torchao])
@pytest.mark.parametrize("given", [{}, {"offloaded": []}, {"state": {}}, [1], None])
def test_what_is_not_the_dict_of_an_optimizer_is_told(decode: Any, given: Any) -> None:
    with pytest.raises(ValueError, match=r"is not the state_dict of one optimizer of (bitsandbytes|torchao)"):
        decode(given)


STORED = {"codes": CODES, "scale": torch.ones(16), "qmap": torch.zeros(256)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qmap": torch.zeros(8)}, "exp_avg of parameter 0 has codes of torch.uint8, and a map that has 8"),
        ({"qmap": None}, "exp_avg of parameter 0 .* a map that has 0 entries"),
        ({"scale": torch.ones(15)}, "exp_avg of parameter 0 has 4096 codes and 15 scales"),
        ({"scale": torch.ones(0)}, "4096 codes and 0 scales"),
        ({"codes": CODES[0]}, r"64 codes and 16 scales for shape \(64, 64\)"),
    ],
)
def test_what_torchao_does_not_save_is_told(changes: dict[str, Any], message: str) -> None:
    state = Stored(CODES.shape, **STORED | changes)
    with pytest.raises(ValueError, match=message):
        from_torchao({"state": {0: {"exp_avg": state}}, "param_groups": []})


def test_a_state_that_is_no_tensor_is_told() -> None:
    with pytest.raises(ValueError, match="exp_avg of parameter 0 is a str"):
        from_torchao({"state": {0: {"exp_avg": "m"}}, "param_groups": []})
