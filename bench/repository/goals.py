"""The goals: numbers that a run is held against. Each line says where it is read in the results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..report.records import GoalValue, Spread
from ..report.results import Results

Measure = Callable[[Results], float | None]


@dataclass(frozen=True)
class Goal:
    """A quantity with three marks: must, target and stretch."""

    key: str
    what: str
    measure: Measure
    marks: tuple[float, float, float]
    higher: bool = False  # whether more is better

    def verdict(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        for name, mark in reversed(list(zip(("must", "target", "stretch"), self.marks, strict=True))):
            if value >= mark if self.higher else value <= mark:
                return name
        return "missed"


def _over(name: str, method: str, to: str, clock: str = "ratio_to") -> Measure:
    return lambda results: _quiet(results.ratio(name, method, to, clock))


def _chain(extras: str, to: str, dtypes: str = "fp32", subject: str = "AdamW") -> Measure:
    """Our step with extras over another: `to` is "plain", our own without them, or "eager", composed."""
    other = PLAIN if to == "plain" else f"eager_{extras}"
    where = {"dtypes": dtypes, "subject": subject, "extras": extras}
    return lambda results: _quiet(results.ratio(GPT, f"own_{extras}", other, **where))


def _quiet(spread: Spread | None) -> float | None:
    return spread.quiet if spread else None


def _share_of_stream(name: str, method: str) -> Measure:
    """Bandwidth in % of the memory stream's, timed in the same rounds."""

    def measure(results: Results) -> float | None:
        over = _quiet(results.ratio(name, method, "stream_4r3w"))
        return 100 / over if over else None

    return measure


def _of(name: str, method: str, key: str, dtypes: str = "fp32") -> Measure:
    def measure(results: Results) -> float | None:
        row = results.find(name, method, dtypes)
        value: float | None = getattr(row, key) if row else None
        return value

    return measure


def _split(name: str) -> Measure:
    """Time over the stream's, relative to the same parameters in ten tensors."""

    def measure(results: Results) -> float | None:
        over = [_over(list_, "own_plain", "stream_4r3w")(results) for list_ in (name, "split-10")]
        return over[0] / over[1] if over[0] and over[1] else None

    return measure


def _host(variant: str) -> Measure:
    def measure(results: Results) -> float | None:
        rows = (row for case in results.host if case.variant == variant for row in case.methods)
        return next((_quiet(row.ratio_to.get(T)) for row in rows if row.name == GC), None)

    return measure


GPT, LLAMA, SMALL, CPU_GPT = "gpt2-124m", "llama3-8b-layer-x1", "small-1000", "gpt2-small-cpu"
T, PLAIN, GC, EAGER = "torch_fused", "own_plain", "own_gc", "eager_gc_fused"
WALL = "wall_ratio_to"

GPU = (
    *(
        Goal("G1", f"plain / torch fused, {name}", _over(name, PLAIN, T), (1.0, 0.9, 0.83))
        for name in (GPT, LLAMA, "llama3-8b-layer-x4", "single-2^26")
    ),
    *(
        Goal("G2", f"% of copy, fp32, {name}", _of(name, PLAIN, "pct_copy"), (88, 93, 97), True)
        for name in (GPT, LLAMA)
    ),
    *(
        Goal("G3", f"% of copy, {d}", _of(LLAMA, PLAIN, "pct_copy", d), (82, 90, 95), True)
        for d in ("bf16", "bf16+fp32-state")
    ),
    *(
        Goal("G4", f"GC / plain, {name}", _over(name, GC, PLAIN), (1.05, 1.02, 1.0))
        for name in (GPT, LLAMA, "resnet50")
    ),
    *(
        Goal("G5", f"GC / plain, {name}", _over(name, GC, PLAIN), (1.16, 1.08, 1.03))
        for name in ("long-rows-128k", "long-rows-4m")
    ),
    Goal("G6", f"GC / eager GC + torch fused, {GPT}", _over(GPT, GC, EAGER), (0.75, 0.65, 0.58)),
    *(
        Goal("G7", f"GC / torch fused plain, {name}", _over(name, GC, T), (1.05, 0.92, 0.85))
        for name in (GPT, LLAMA)
    ),
    *(
        Goal("G8", f"GC / torch.compile, {name}", _over(name, GC, "compiled_gc"), (1.05, 1, 0.95))
        for name in (LLAMA, GPT)
    ),
    Goal(
        "G8",
        f"GC / torch.compile, {SMALL}, wall",
        _over(SMALL, GC, "compiled_gc", WALL),
        (0.5, 0.25, 0.1),
    ),
    Goal("G9", "noise / plain", _chain("noise", "plain"), (1.08, 1.03, 1.01)),
    Goal("G10", "noise / plain, bf16", _chain("noise", "plain", "bf16"), (1.25, 1.08, 1.03)),
    Goal("G10", "noise / plain, SGD bf16", _chain("noise", "plain", "bf16", "SGD"), (1.6, 1.3, 1.15)),
    Goal("G11", "noise / torch fused + add_(randn_like)", _chain("noise", "eager"), (0.75, 0.6, 0.52)),
    Goal("G12", "clip / plain", _chain("clip", "plain"), (1.22, 1.16, 1.14)),
    Goal("G12", "clip / clip_grad_norm_ + torch fused", _chain("clip", "eager"), (0.85, 0.72, 0.66)),
    Goal("G13", "EMA / plain", _chain("ema", "plain"), (1.38, 1.31, 1.29)),
    Goal("G13", "EMA / torch fused + foreach lerp", _chain("ema", "eager"), (0.95, 0.82, 0.75)),
    Goal("G14", "clip, noise, GC, EMA / plain", _chain("chain", "plain"), (1.6, 1.47, 1.43)),
    Goal("G14", "clip, noise, GC, EMA / composed", _chain("chain", "eager"), (0.6, 0.46, 0.42)),
    Goal("G15", "host time / torch fused, same gradients", _host("unchanged"), (0.2, 0.08, 0.05)),
    Goal("G16", "host time / torch fused, moved", _host("reallocated"), (0.3, 0.12, 0.08)),
    Goal("G17", "wall, 1000x1024", _over("1000x1024", PLAIN, T, WALL), (0.25, 0.1, 0.06)),
    Goal("G17", "wall, 10000x64", _over("10000x64", PLAIN, T, WALL), (0.2, 0.07, 0.05)),
    Goal("G18", "resnet50, device", _over("resnet50", PLAIN, T), (0.85, 0.65, 0.5)),
    Goal("G18", "resnet50, wall", _over("resnet50", PLAIN, T, WALL), (0.8, 0.55, 0.45)),
    Goal("G19", "one tensor of 2^20", _over("single-2^20", PLAIN, T), (0.6, 0.3, 0.15)),
    *(Goal("G20", f"launches, {name}", _of(name, GC, "launches"), (4, 1, 1)) for name in (GPT, SMALL)),
    Goal("G24", "100M in 1,000 / in 10 tensors", _split("split-1000"), (1.1, 1.04, 1.02)),
    Goal("G24", "100M in 10,000 / in 10 tensors", _split("split-10000"), (1.4, 1.2, 1.1)),
)
CPU = (
    Goal("C1", f"plain / torch fused, {CPU_GPT}", _over(CPU_GPT, PLAIN, T), (1.03, 1.0, 0.98)),
    Goal("C1", f"plain / torch fused, {SMALL}", _over(SMALL, PLAIN, T), (0.8, 0.66, 0.64)),
    Goal("C2", f"eager, {CPU_GPT}", _over(CPU_GPT, "own_gc_eager", T), (1.5, 1.2, 1.16)),
    Goal("C2", f"eager, {SMALL}", _over(SMALL, "own_gc_eager", T), (1.25, 1.12, 1.12)),
    Goal("C3", f"GC / torch fused plain, {CPU_GPT}", _over(CPU_GPT, GC, T), (1.1, 1.02, 0.97)),
    Goal("C3", f"GC / torch fused plain, {SMALL}", _over(SMALL, GC, T), (0.6, 0.5, 0.47)),
    Goal("C3", "GC / torch fused plain, tiny", _over("tiny-1000", GC, T), (0.1, 0.05, 0.03)),
    Goal("C4", f"GC / eager GC + torch, {CPU_GPT}", _over(CPU_GPT, GC, EAGER), (0.75, 0.68, 0.68)),
    Goal("C4", "eager / eager GC + torch", _over(CPU_GPT, "own_gc_eager", EAGER), (0.95, 0.83, 0.83)),
    Goal("C5", f"% of stream, GC, {CPU_GPT}", _share_of_stream(CPU_GPT, GC), (85, 93, 97), True),
    Goal("C6", "noise / torch fused + add_(randn_like)", _chain("noise", "eager"), (0.35, 0.2, 0.15)),
    Goal("C8", "clip, noise, GC, EMA / composed", _chain("chain", "eager"), (0.5, 0.46, 0.42)),
)


def judge(results: Results) -> list[GoalValue]:
    """Every goal of the device with its value and the best mark that it reached."""
    values = [(goal, goal.measure(results)) for goal in (GPU if results.device else CPU)]
    return [GoalValue(goal.key, goal.what, value, *goal.marks, goal.verdict(value)) for goal, value in values]
