"""Option sets of every rule, with numbers that no mistake leaves unchanged.

They keep what `Trial` judges well-conditioned, for gradients of size 0.4 to 1.8: quotients are of numbers
that are not small, epsilons are large enough to show, states stay below about 2 but for Adagrad's sum,
in which only the newest square is computed. What RMSprop's centred form takes the root of is positive.
Lion's betas keep what it takes the sign of at least 0.02 away from 0 though the momentum outweighs the
gradient. Signum's momentum does so by never outweighing it: see test_kernels_special.py for where it does.
"""

from typing import Any

_LR = {"lr": 0.1}
_AVERAGES = {**_LR, "betas": (0.8, 0.95)}
_LARS = {**_LR, "momentum": 0.4, "trust_coeff": 0.2, "eps": 0.1}
_INSIDE = {"eps": 0.3, "eps_inside_sqrt": True}
_DECOUPLED = {"decoupled_weight_decay": True, "weight_decay": 0.3}
_RMS = {**_LR, "alpha": 0.6, "eps": 0.2}
_ADAN = {**_LR, "betas": (0.8, 0.7, 0.95), "eps": 0.1}
_ADOPT = {**_AVERAGES, "eps": 1.0}
_ADEMAMIX = {**_LR, "betas": (0.8, 0.95, 0.9), "alpha": 0.5, "eps": 0.1}

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        _LR,
        {**_LR, "momentum": 0.9, "dampening": 0.4},
        {**_LR, "momentum": 0.9, "nesterov": True, "maximize": True},
    ],
    "SGDW": [{**_LR, "momentum": 0.9, "dampening": 0.4}],
    "Adam": [
        _AVERAGES,
        {**_AVERAGES, "amsgrad": True, "eps": 0.3, "maximize": True},
        {**_AVERAGES, **_DECOUPLED, "eps": 0.01},
        {**_AVERAGES, **_INSIDE},
    ],
    "AdamW": [
        {**_AVERAGES, "eps": 0.3, "maximize": True},
        {**_AVERAGES, "amsgrad": True},
        {**_AVERAGES, **_INSIDE, "amsgrad": True},
    ],
    "Adagrad": [
        {**_LR, "lr_decay": 0.5, "initial_accumulator_value": 0.25, "eps": 0.3},
        {**_LR, **_INSIDE, "maximize": True},
    ],
    "Adadelta": [{"lr": 0.5, "rho": 0.8, "eps": 0.1}],
    "RMSprop": [
        _RMS,
        {**_RMS, "momentum": 0.4},
        {**_RMS, "centered": True, "maximize": True},
        {**_RMS, "centered": True, "momentum": 0.4},
        {**_RMS, **_INSIDE, "centered": True, "momentum": 0.4},
    ],
    "Adamax": [{**_AVERAGES, "eps": 0.1}],
    "NAdam": [
        {**_AVERAGES, "momentum_decay": 0.3},
        {**_AVERAGES, **_DECOUPLED, "eps": 0.1, "momentum_decay": 5.0},
    ],
    "RAdam": [{**_AVERAGES, "eps": 0.1}, {**_AVERAGES, **_DECOUPLED}],
    "Lion": [{**_LR, "betas": (0.9, 0.1)}, {**_LR, "betas": (0.9, 0.1), "maximize": True}],
    "Signum": [
        {**_LR, "momentum": 0.15},
        {**_LR, "momentum": 0.0},
        {**_LR, "momentum": 0.15, "decoupled_weight_decay": False, "weight_decay": 0.3},
    ],
    "Adan": [_ADAN, {**_ADAN, "no_prox": True, "weight_decay": 0.3, "maximize": True}],
    "ADOPT": [
        _ADOPT,
        {**_ADOPT, "clip_exponent": None},
        {**_ADOPT, **_DECOUPLED, "clip_exponent": 0.5},
    ],
    "AdEMAMix": [_ADEMAMIX, {**_ADEMAMIX, "alpha_warmup": 6.0, "beta3_warmup": 5.0, "maximize": True}],
    "AdaBelief": [{**_AVERAGES, "eps": 0.1}, {**_AVERAGES, **_DECOUPLED, "eps": 0.01}],
    "LaProp": [{**_AVERAGES, "eps": 0.1}],
    "LAMB": [
        {**_AVERAGES, "eps": 0.1, "weight_decay": 0.3},
        {**_AVERAGES, "eps": 0.1, "always_adapt": True, "trust_clip": True, "maximize": True},
    ],
    "LARS": [
        {**_LARS, "weight_decay": 0.3},
        {**_LARS, "nesterov": True, "always_adapt": True, "trust_clip": True},
        {**_LR, "always_adapt": True, "trust_coeff": 0.2},
    ],
    "StableAdamW": [{**_AVERAGES, "eps": 0.1}, {**_AVERAGES, "eps": 0.1, "weight_decay": 0.3}],
    "AdamMini": [{**_AVERAGES, "eps": 0.1}],
}
