"""What noise a user can ask for, its schedules, and its numbers in NumPy, those of kernels/philox.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple
from zlib import crc32

import numpy as np

from .hostmath import is_remote, number_of
from .kernels import philox as device

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class GradientNoise:
    r"""Annealed Gaussian noise on the gradient, before centring.

    .. math:: g_t \leftarrow g_t + N(0, \sigma_t^2), \; \sigma_t^2 = \eta / (1 + t)^\gamma, \; t = 0, 1, ...

    Args:
        eta: variance :math:`\eta` at the first step, in units of the gradient squared. Default 0.01.
        gamma: how fast it falls. Default 0.55.

    Source: Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015.

    >>> import torch, fusedcalib
    >>> opt = fusedcalib.SGD([torch.zeros(2)], noise=fusedcalib.GradientNoise(eta=0.3), seed=1)
    >>> opt.param_groups[0]["noise"]
    {'kind': 'gradient', 'eta': 0.3, 'gamma': 0.55}
    """

    kind: ClassVar[str] = "gradient"
    eta: float = 0.01
    gamma: float = 0.55


@dataclass(frozen=True)
class WeightNoise:
    r"""Gaussian noise on the weights, after the step, whatever the learning rate; none where that is 0.

    .. math:: \theta_t \leftarrow \theta_t + N(0, \sigma^2)

    Args:
        std: :math:`\sigma`, in units of the parameter. Default 1e-4.

    Source: "CSGD", Algorithm 1, line 6.

    >>> import fusedcalib
    >>> fusedcalib.WeightNoise(std=1e-3)
    WeightNoise(std=0.001)
    """

    kind: ClassVar[str] = "weights"
    std: float = 1e-4


@dataclass(frozen=True)
class LangevinNoise:
    r"""The noise that makes SGD sample from :math:`\exp(-f / T)` (SGLD).

    .. math:: \theta_t \leftarrow \theta_t + N(0, 2 \gamma T), \qquad \gamma \text{ the learning rate}

    Args:
        temperature: :math:`T`, in units of the loss. Default 1.

    Source: Welling and Teh, "Bayesian Learning via Stochastic Gradient Langevin Dynamics", ICML 2011.

    >>> import fusedcalib
    >>> fusedcalib.LangevinNoise(temperature=0.5)
    LangevinNoise(temperature=0.5)
    """

    kind: ClassVar[str] = "langevin"
    temperature: float = 1.0


Noise = GradientNoise | WeightNoise | LangevinNoise
KINDS: dict[str, type[Noise]] = {cls.kind: cls for cls in (GradientNoise, WeightNoise, LangevinNoise)}


def as_dict(noise: Noise | Mapping[str, Any] | None) -> dict[str, Any]:
    """Noise as param groups and checkpoints hold it: plain; {} where there is none.

    Raises:
        ValueError: it is none of the noises, or a number of it is negative or not finite.
    """
    if not noise:
        return {}
    if isinstance(noise, Mapping):
        options = {key: value for key, value in noise.items() if key != "kind"}
        if noise.get("kind") not in KINDS:
            raise ValueError(f"Invalid noise: {dict(noise)}, expected a kind of {', '.join(KINDS)}")
        try:
            noise = KINDS[noise["kind"]](**options)
        except TypeError as error:
            raise ValueError(f"Invalid noise: {noise}: {error}") from None
    if not isinstance(noise, Noise):
        names = ", ".join(cls.__name__ for cls in KINDS.values())
        raise ValueError(f"Invalid noise: {noise!r}, expected one of {names}, its dict, or None")
    options = {field.name: getattr(noise, field.name) for field in fields(noise)}
    for name, value in options.items():
        if is_remote(value):
            raise ValueError(
                f"Invalid {name} of {type(noise).__name__}: a tensor on {value.device}, expected a Python "
                "number: unlike hyperparameters those of a noise cannot lie on a device"
            )
        options[name] = value = number_of(value)
        if not 0 <= value < math.inf:
            raise ValueError(
                f"Invalid {name} of {type(noise).__name__}: {value}, expected a finite number >= 0"
            )
    return {"kind": noise.kind, **options}


class Parsed(NamedTuple):
    """What a step has to know of a noise.

    Attributes:
        stage: where it acts: "none", "gradient" or "weights".
        schedule: its standard deviation as scale * step^power * lr^power, and whether parameters that stay
            have it too. Steps count from 1.
    """

    stage: str = "none"
    schedule: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


NO_NOISE = Parsed()


def parsed(noise: Noise | Mapping[str, Any] | None) -> Parsed:
    """What a step has to know of a noise; worked out once for each that param groups have.

    Raises:
        ValueError: as `as_dict`.
    """
    if not noise:
        return NO_NOISE
    if type(noise) is dict and {float, int, str}.issuperset(map(type, noise.values())):
        return _known(tuple(noise.items()))
    return _parse(noise)  # an object, or numbers that may change where they lie


def _parse(noise: Noise | Mapping[str, Any]) -> Parsed:
    options = as_dict(noise)
    if options["kind"] == "gradient":
        return Parsed("gradient", (math.sqrt(options["eta"]), -options["gamma"] / 2, 0.0, 1.0))
    if options["kind"] == "weights":
        return Parsed("weights", (options["std"], 0.0, 0.0, 0.0))
    return Parsed("weights", (math.sqrt(2 * options["temperature"]), 0.0, 0.5, 0.0))


@lru_cache
def _known(items: tuple[tuple[str, Any], ...]) -> Parsed:
    return _parse(dict(items))


def words_of(seed: int, name: str | None, index: int) -> tuple[int, int, int]:
    """A parameter's stream and the two words of its key.

    By its name where it has one, so that its noise does not depend on its place in the model; else by its
    place. The name goes into 64 bits: two names never share a stream in practice.
    """
    stream = index if name is None else crc32(name.encode()) | crc32(name[::-1].encode(), 1) << 32
    return stream & 0xFFFFFFFF, seed & 0xFFFFFFFF, (seed >> 32 ^ stream >> 32) & 0xFFFFFFFF


def words_for(groups: Sequence[Mapping[str, Any]]) -> dict[Any, tuple[int, int, int]]:
    """Those of every parameter of some param groups: by its name, else by its place among all."""
    found: dict[Any, tuple[int, int, int]] = {}
    for group in groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for name, param in zip(names, group["params"], strict=True):
            found[param] = words_of(group["seed"], name, len(found))
    return found


def philox(counter: tuple[Array | int, ...], key: tuple[int, int]) -> tuple[Array, ...]:
    """Philox-4x32-10: four words (uint64 arrays below 2^32) of a counter of four words and a key of two."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(device.ROUNDS):
        first, second = (c * np.uint64(m) for c, m in zip((c0, c2), device.MULTIPLIERS, strict=True))
        c0 = (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c2 = (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = second & low, first & low
        k0, k1 = (k0 + device.WEYL[0]) & 0xFFFFFFFF, (k1 + device.WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def normals(
    first: int,
    count: int,
    step: int,
    words: tuple[int, int, int],
    sigma: float = 1.0,
    stage: str = "gradient",
) -> Array:
    """The noise, fp32 [count], of elements `first` and on of a parameter."""
    a0, a1, b0, b1 = _words(first, count, step, words, stage)
    flat = np.stack([*_pair(a0, a1, sigma), *_pair(b0, b1, sigma)], axis=1).reshape(-1)
    return flat[first % 4 : first % 4 + count]


def rounding_words(first: int, count: int, step: int, words: tuple[int, int, int]) -> Array:
    """Random words, uint64 [count] below 2^32, of elements `first` and on.

    The lower half rounds the parameter, the upper half states.
    """
    flat: Array = np.stack(_words(first, count, step, words, "rounding"), axis=1).reshape(-1)
    return flat[first % 4 : first % 4 + count]


def _words(first: int, count: int, step: int, words: tuple[int, int, int], purpose: str) -> tuple[Array, ...]:
    """The four words of each counter that elements `first` and on need."""
    quads = np.arange(first // 4, (first + count + 3) // 4, dtype=np.uint64)
    last = step | device.PURPOSES[purpose] << 30
    return philox((quads & np.uint64(0xFFFFFFFF), quads >> np.uint64(32), words[0], last), words[1:])


def _pair(a: Array, b: Array, sigma: float) -> tuple[Array, Array]:
    """Two normals of two words, operation by operation as on the device."""
    f32, i32 = np.float32, np.int32
    u = _fma(a.astype(f32), f32(2.0**-32), f32(2.0**-33))
    bits = u.view(i32) - i32(device.SQRT_HALF)
    s = ((bits & i32(0x7FFFFF)) + i32(device.SQRT_HALF)).view(f32) - f32(1)
    exponent = (bits >> i32(23)).astype(f32)
    radius = np.sqrt(_fma(exponent, f32(device.MINUS_TWO_LN2), _horner(s, device.LOG) * s)) * f32(sigma)
    f = ((b & np.uint64(0x7FFFFF)) | np.uint64(0x40000000)).astype(np.uint32).view(f32) - f32(3)
    z = f * f
    sine = radius * (_horner(z, device.SIN) * f)
    cosine = radius * _horner(z, device.COS)
    return sine, np.where(b >> np.uint64(31) != 0, -cosine, cosine)


def _fma(x: Array, y: Any, z: Any) -> Array:
    """x y + z, rounded once but for one case in 2^29: the product is exact in double."""
    wide = np.asarray(x, np.float64) * np.asarray(y, np.float64) + np.asarray(z, np.float64)
    return np.asarray(wide, np.float32)


def _horner(x: Array, coefficients: tuple[float, ...]) -> Array:
    y = np.full_like(x, np.float32(coefficients[-1]))
    for coefficient in coefficients[-2::-1]:
        y = _fma(x, y, np.float32(coefficient))
    return y
